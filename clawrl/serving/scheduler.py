"""vLLM's scheduler, which lets log-probabilities that nobody reads while they stream travel in fewer messages.

Runs in the engine's process; vLLM finds it by the name that `engine` gives it. Capture asks for log-probabilities of
every token. Sent with each token, as vLLM does, they take longer to encode and decode than the token took to sample
(tiny model, 16 streams); kept back, they cost little. The tokens themselves are never delayed.
"""

from __future__ import annotations

from typing import Any

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
        self._kept: dict[str, list[LogprobsLists]] = {}

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

    def update_from_output(self, *arguments: Any, **options: Any) -> Any:
        answer = super().update_from_output(*arguments, **options)
        for batch in answer.values():
            for output in batch.outputs:
                kept = self._kept.get(output.request_id)
                if kept is None:
                    continue
                if output.new_logprobs is not None:
                    kept.append(output.new_logprobs)
                    output.new_logprobs = None
                if kept and (output.finished or len(kept) >= ROWS):
                    output.new_logprobs = joined(kept)
                    kept.clear()
                if output.finished:
                    del self._kept[output.request_id]
        return answer


def joined(parts: list[LogprobsLists]) -> LogprobsLists:
    """The rows of all parts, in their order."""
    return LogprobsLists(
        np.concatenate([part.logprob_token_ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.sampled_token_ranks for part in parts]),
    )
