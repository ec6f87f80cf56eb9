"""Our own tasks: families by name, each a function of a random generator."""

from __future__ import annotations

import random

from clawrl.rollout.env import Split, split_of
from envs.terminal.task import TerminalTask
from envs.terminal.tasks import archives, data, files, git, processes, programs, text
from envs.terminal.tasks.family import Family, as_task

FAMILIES: dict[str, Family] = {
    f"{module.__name__.rpartition('.')[2]}/{function.__name__}": function
    for module, functions in (
        (files, (
            files.make_file, files.make_tree, files.sort_by_ending, files.rename_numbers, files.remove_temporary,
            files.largest_file, files.same_content, files.newest_version, files.empty_folders, files.permissions,
            files.world_writable, files.copy_matching,
        )),
        (text, (
            text.count_level, text.most_frequent, text.sorted_unique, text.replace_word, text.cut_column,
            text.join_tables, text.line_ends, text.find_definition, text.time_window, text.fill_template,
            text.sum_column, text.word_counts,
        )),
        (data, (
            data.csv_totals, data.json_query, data.json_overlay, data.csv_to_json, data.ini_edit, data.sqlite_query,
            data.repair_jsonl,
        )),
        (archives, (
            archives.pack, archives.unpack_nested, archives.which_archive, archives.wrong_checksum, archives.decode,
        )),
        (git, (git.commit, git.restore, git.merge, git.first_bad, git.authors)),
        (programs, (
            programs.mend_function, programs.write_function, programs.write_filter, programs.mend_makefile,
        )),
        (processes, (
            processes.end_process, processes.serve_file, processes.answer_program, processes.wrapper,
        )),
    )
    for function in functions
}  # fmt: skip


def make_own_task(number: int, split: Split) -> TerminalTask:
    """Task `number` of a split: families take turns. The same number gives the same task."""
    names = list(FAMILIES)
    name = names[number % len(names)]
    rng = random.Random(f"terminal/{name}/{number // len(names)}")
    while True:
        task = as_task(name, FAMILIES[name](rng))
        if split_of(task.id) == split:
            return task
