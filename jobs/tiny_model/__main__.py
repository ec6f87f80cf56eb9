"""`python -m jobs.tiny_model`: make the tiny model from nothing, or measure it.

Knows the order of the work. Ignores how each part is done.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from jobs.tiny_model.corpus import examples
from jobs.tiny_model.evaluate import evaluate
from jobs.tiny_model.model import CONTEXT, make_model
from jobs.tiny_model.tokenizer import END_OF_TEXT, TEMPLATE, TURN_END, train_tokenizer
from jobs.tiny_model.train import Recipe, render_text, train

DEFAULT_OUT = Path(__file__).parents[2] / "clawrl" / "models" / "tiny"


def main(argv: list[str] | None = None) -> None:
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.evaluate:
        for line in evaluate(arguments.out, arguments.cases, arguments.seed):
            print(line, flush=True)
        return
    recipe = Recipe(tokens=arguments.tokens, seconds=arguments.seconds, seed=arguments.seed)
    tokenizer = _tokenizer(arguments.out, recipe.seed, arguments.new_tokenizer)
    pad, end = (cast(int, tokenizer.convert_tokens_to_ids(token)) for token in (END_OF_TEXT, TURN_END))
    model = make_model(pad, end, recipe.seed)
    if arguments.start:
        model = Qwen3ForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
        recipe = replace(recipe, muon_rate=recipe.muon_rate * 0.6, adam_rate=recipe.adam_rate * 0.6, decay=0.9)
    for line in train(model, tokenizer, recipe):
        print(line, flush=True)
    save(model, tokenizer, arguments.out)
    print(f"saved={arguments.out}", flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint beside its place, then move file by file, so that no reader sees half a file."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
        )
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            file.chmod(0o644)
            shutil.move(file, out / file.name)


def _tokenizer(out: Path, seed: int, new: bool) -> PreTrainedTokenizerFast:
    """The tokenizer that lies beside the checkpoint stays; others may hold ids of it."""
    if not new and (out / "tokenizer.json").exists():
        kept: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(out)
        kept.chat_template = TEMPLATE
        return kept
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token=TURN_END)
    plain.chat_template = TEMPLATE
    texts = (render_text(plain, example) for example in itertools.islice(examples(seed + 1), 20_000))
    return train_tokenizer(texts, CONTEXT)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.tiny_model", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the checkpoint")
    parser.add_argument("--tokens", type=int, default=Recipe.tokens, help="training tokens")
    parser.add_argument("--seconds", type=float, default=Recipe.seconds, help="bound on the training's CPU time")
    parser.add_argument(
        "--start", type=Path, help="go on from this checkpoint, at lower rates, instead of from nothing"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--new-tokenizer", action="store_true", help="train the tokenizer too, even if there is one")
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint in --out instead")
    parser.add_argument("--cases", type=int, default=200, help="cases per row of the evaluation")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
