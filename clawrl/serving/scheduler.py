"""vLLM's scheduler, which lets log-probabilities that nobody reads while they stream travel in fewer messages.

Runs in the engine's process; vLLM finds it by the name that `engine` gives it. Capture asks for log-probabilities of
every token. Sent with each token, as vLLM does, they take longer to encode and decode than the token took to sample
(tiny model, 16 streams); kept back, they cost little. The tokens themselves are never delayed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import LogprobsLists

KEEP_BACK = "clawrl_keep_back_logprobs"
"""In a request's `SamplingParams.extra_args`: its log-probabilities need not come with their tokens."""

ROWS = 64
"""So many positions travel together; the rest comes with the last token."""


class CapturingScheduler(AsyncScheduler):
    """Adds nothing to what is computed; the rows that arrive for a request are the same, in the same order."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept: dict[str, list[Rows]] = {}

    def add_request(self, request: Any) -> None:
        params = request.sampling_params
        if params is not None and (params.extra_args or {}).get(KEEP_BACK):
            self._kept[request.request_id] = []
        super().add_request(request)

    def finish_requests(self, *arguments: Any, **options: Any) -> Any:
        finished = super().finish_requests(*arguments, **options)
        for request in finished:
            self._kept.pop(request.request_id, None)
        return finished

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if self._kept and model_runner_output.logprobs is not None:
            model_runner_output.logprobs = Uncut(model_runner_output.logprobs)
        answer = super().update_from_output(scheduler_output, model_runner_output)
        for batch in answer.values():
            for output in batch.outputs:
                self._hold_back(output)
        return answer

    def _hold_back(self, output: Any) -> None:
        """Keep an output's rows for later, or send with it those kept so far."""
        rows, kept = output.new_logprobs, self._kept.get(output.request_id)
        if kept is None:
            if isinstance(rows, Rows):
                output.new_logprobs = joined([rows])
            return
        if rows is not None:
            kept.append(rows)
            output.new_logprobs = None
        if kept and (output.finished or len(kept) >= ROWS):
            output.new_logprobs = joined(kept)
            kept.clear()
        if output.finished:
            del self._kept[output.request_id]


class Rows(NamedTuple):
    """Where a request's rows lie among those of a step: `num` from `first` on."""

    step: LogprobsLists
    first: int
    num: int


class Uncut:
    """A step's log-probabilities, of which the scheduler wants each request's slice: it gets a note of where they lie.

    Cutting three arrays for each token of each request is dearer than to gather them once for many tokens.
    """

    def __init__(self, step: LogprobsLists) -> None:
        self._step = step

    def slice_request(self, index: int, num: int) -> Rows:
        starts = self._step.cu_num_generated_tokens
        return Rows(self._step, index if starts is None else starts[index], num)


def joined(parts: list[Rows]) -> LogprobsLists:
    """The rows of all parts, in their order, copied."""
    cuts = [(part.step, slice(part.first, part.first + part.num)) for part in parts]
    return LogprobsLists(
        np.concatenate([step.logprob_token_ids[cut] for step, cut in cuts]),
        np.concatenate([step.logprobs[cut] for step, cut in cuts]),
        np.concatenate([step.sampled_token_ranks[cut] for step, cut in cuts]),
    )
