"""Trainer checkpoints: what training needs beyond a version's weights, kept so that a restart changes nothing.

Knows torch's distributed checkpoints: every rank writes its shards, any number of ranks reads them. Ignores what the
tensors are. A checkpoint belongs to one version made from one parent and is on disk before that version is offered;
of each policy (everyone's, a user's) the newest two of the line stay, since the version of the newest may not have been
recorded. A policy's first version begins without: moments are not those of the policy that it came from.

Ray Train's own `report(checkpoint=…)` would not do: its controller takes one report in two seconds and keeps the newest
checkpoint, which is the wrong one after a crash between checkpoint and version, and after a rollback.

The folder must be the same for all ranks; where machines share no storage, a restart finds some shards missing and
moments start anew.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from clawrl.training.checkpoint import states_of
from clawrl.types import GROUP

logger = logging.getLogger(__name__)

KEPT = 2


class TrainerCheckpoints:
    """The checkpoints of one run. All methods are collectives: all ranks call them alike."""

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self._every = folder, every
        for state in folder.glob("*-from-*") if dist.get_rank() == 0 else ():  # as runs kept them before users had any
            (folder / states_of(GROUP)).mkdir(exist_ok=True)
            state.rename(folder / states_of(GROUP) / state.name)

    def save(self, line: Sequence[int], state: dict[str, Tensor], scope: str = GROUP) -> None:
        """Keep the state that goes with version line[0], made from line[1].

        A failure costs only the exactness of a restart, so it is logged and training goes on.
        """
        if not self._every or line[0] % self._every:
            return
        folder = self._of(line, scope)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            writer = FileSystemWriter(unfinished, overwrite=True)
            save_shards(state, storage_writer=writer, planner=DefaultSavePlanner(enable_plan_caching=True))
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                unfinished.rename(folder)
                self._remove_others(line, scope)
        except (CheckpointException, OSError) as error:
            logger.warning("event=checkpoint_not_saved version=%d error=%s", line[0], _short(error))

    def has(self, line: Sequence[int], scope: str = GROUP) -> bool:
        """Whether there is a state of version line[0], as rank 0 sees it."""
        box = [self._every > 0 and (self._of(line, scope) / ".metadata").is_file()]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if not box[0]:
            logger.info("event=moments_anew version=%d reason=%r", line[0], "no checkpoint of this version")
        return box[0]

    def load(self, line: Sequence[int], state: dict[str, Tensor], scope: str = GROUP) -> bool:
        """Restore the state of version line[0] in place; averages that it lacks stay as they are.

        False, with a log line, if it cannot be read whole; then the tensors may hold anything.
        """
        try:
            reader = FileSystemReader(self._of(line, scope))
            with suppress(Exception):  # damage is told below, to all ranks alike
                there = reader.read_metadata().state_dict_metadata
                state = {key: each for key, each in state.items() if key in there or not key.endswith("/average")}
            load_shards(state, storage_reader=reader)
        except (CheckpointException, OSError) as error:
            logger.warning("event=moments_anew version=%d reason=%r", line[0], _short(error))
            return False
        logger.info("event=moments_restored version=%d", line[0])
        return True

    def _of(self, line: Sequence[int], scope: str) -> Path:
        """A number that was refused is used again, with another parent: both name the folder."""
        return self._folder / states_of(scope) / f"{line[0]}-from-{line[1] if len(line) > 1 else 'none'}"

    def _remove_others(self, line: Sequence[int], scope: str) -> None:
        there = (folder for start in range(len(line)) if (folder := self._of(line[start:], scope)).is_dir())
        kept = set(islice(there, KEPT))
        for folder in self._of(line, scope).parent.iterdir():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def _short(error: Any) -> str:
    """The first rank's reason; a CheckpointException carries tracebacks."""
    failures = getattr(error, "failures", None) or {}
    first = next(iter(failures.values()), (error,))
    return f"{type(first[0]).__name__}: {first[0]}".splitlines()[0][:200]
