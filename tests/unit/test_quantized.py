"""A base in 4 bits: how it is made, that its packed layers are the same weights, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pack import VOCABULARY, sample, score

from clawrl.cli import main
from clawrl.config import LoraSection, load_config
from clawrl.errors import ConfigError
from clawrl.main import check
from clawrl.training.checkpoint import appearing
from clawrl.training.model import TokenScorer
from clawrl.training.pack import pack
from clawrl.training.packed_linear import PackedLinear
from clawrl.training.quantized import quantize, require_trained
from jobs import free_port

GROUP = 32
LORA = LoraSection(rank=8, alpha=16.0, targets=("q_proj", "o_proj", "down_proj"))


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A random little Qwen2, whose queries, keys and values have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, tie_word_embeddings=False, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def packed(original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    assert main(["quantize", str(original), str(folder), "--group", str(GROUP)]) == 0
    return folder


@pytest.fixture(scope="module")
def unpacked(packed, tmp_path_factory) -> Path:
    """The same weights in floating point, unpacked by compressed-tensors."""
    model = loaded(packed)
    model(torch.tensor([[1]]))
    del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict({name: each for name, each in model.state_dict().items() if name in plain.state_dict()})
    folder = tmp_path_factory.mktemp("unpacked")
    plain.save_pretrained(folder)
    return folder


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}


def test_weights_are_rounded_to_the_nearest_of_their_group(original, unpacked, packed):
    before, after = linears(loaded(original)), linears(loaded(unpacked))
    assert torch.equal(before["lm_head"].weight, after["lm_head"].weight)
    for name in before.keys() - {"lm_head"}:
        grouped = before[name].weight.unflatten(1, (-1, GROUP))
        scale = (grouped.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
        off = (after[name].weight.unflatten(1, (-1, GROUP)) - grouped).abs()
        assert (off <= scale * 0.54).all(), "half a step, and what 16 bits round at the ends"
        assert off.max() > 0, name
    assert (packed / "tokenizer_config.json").exists()
    assert sum(file.stat().st_size for file in packed.glob("*.safetensors")) < 0.5 * sum(
        file.stat().st_size for file in original.glob("*.safetensors")
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_learns_over_it_as_over_the_same_weights_unpacked(packed, unpacked, checkpointing):
    ((row,),) = pack([sample(i, 4, 9 + i, k=2) for i in range(4)], world=1, pack_tokens=4096)
    found = []
    for folder in (packed, unpacked):
        torch.manual_seed(1)
        scorer = TokenScorer.load(str(folder), logit_chunk=1000, activation_checkpointing=checkpointing, lora=LORA)
        for name, parameter in scorer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        scored = score(scorer, row)
        (scored.logprobs.mean() + scored.support.exp().sum(-1).mean()).backward()
        gradients = {name: each.grad for name, each in scorer.named_parameters() if each.requires_grad}
        found.append((scorer, scored.logprobs.detach(), gradients))
    (kept, logprobs, gradients), (_, expected, wanted) = found
    assert sum(isinstance(each, PackedLinear) for each in kept.modules()) == 2 * 7
    assert gradients.keys() == wanted.keys()
    assert all(".lora_" in name for name in gradients)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_a_layer_keeps_no_more_than_its_packed_weight(packed):
    scorer = TokenScorer.load(str(packed), logit_chunk=1000, lora=LORA)
    with pytest.raises(ConfigError, match=r"add \[lora\]"):
        TokenScorer.load(str(packed), logit_chunk=1000)
    layer = next(each for each in scorer.modules() if isinstance(each, PackedLinear))
    assert (layer.qweight.dtype, layer.qweight.shape) == (torch.int32, (layer.out_features, layer.in_features // 8))
    assert layer.scale.shape == (layer.out_features, layer.in_features // GROUP)
    assert layer.weight is None
    input = torch.randn(3, layer.in_features, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        layer(input)
    assert not kept


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_method": "awq", "format": None}, "quantised as awq;"),
        ({"format": "nvfp4-pack-quantized"}, "quantised as compressed-tensors nvfp4"),
        ({"num_bits": 8}, "symmetric groups of 4 bits and no order of activations alone"),
        ({"symmetric": False}, "symmetric groups of 4 bits"),
        ({"actorder": "group"}, "symmetric groups of 4 bits"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "symmetric groups of 4 bits"),
    ],
)
def test_other_forms_are_refused_with_the_remedy(packed, tmp_path, change, said):
    folder = changed(packed, tmp_path / "model", change)
    with pytest.raises(ConfigError, match=rf"{said}(.|\n)*clawrl quantize"):
        require_trained(str(folder), adapters=True)
    with pytest.raises(ConfigError, match=said):  # what the engine has only just downloaded
        TokenScorer.load(str(folder), logit_chunk=1000, lora=LORA)


@pytest.mark.parametrize(
    "change", [{"actorder": "static"}, {"actorder": "weight"}, {"ignore": ["lm_head", "re:.*mtp"]}]
)
def test_forms_that_are_stored_alike_are_taken(packed, tmp_path, change):
    require_trained(str(changed(packed, tmp_path / "model", change)), adapters=True)


def changed(model: Path, folder: Path, change: dict[str, Any]) -> Path:
    """A copy of a model that says something else of its form."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    form = config["quantization_config"]
    weights = form["config_groups"]["group_0"]["weights"]
    for key, value in change.items():
        (weights if key in weights else form)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_experts_are_refused(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "experts")
    with pytest.raises(ConfigError, match="mixtures of experts are not rounded here"):
        quantize(str(tmp_path / "experts"), tmp_path / "out", 32)
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_with_it_is_refused_before_anything_starts(packed, tmp_path):
    words = [
        f"policy.model={packed}",
        f"run_root={tmp_path}",
        f"gateway.port={free_port()}",
        "learning.teacher=current",
        "learning.kl_weight=0",
    ]
    with pytest.raises(ConfigError, match=r"policy\.dtype=float32: .*set policy\.dtype=bfloat16"):
        check(load_config(None, words))
    with pytest.raises(ConfigError, match=r"only an adapter over such weights can be trained; add \[lora\]"):
        check(load_config(None, [*words, "policy.dtype=bfloat16"]))
    with pytest.raises(ConfigError, match=r"no layer 'c_proj'; it has .*q_proj"):
        check(load_config(None, [*words, "policy.dtype=bfloat16", 'lora.targets=["c_proj"]']))
    check(load_config(None, [*words, "policy.dtype=bfloat16", "lora.rank=8"]))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--group", "128"], 2, "a group of 128 does not divide the 64 inputs of model.layers.0"),
        (["there"], 1, "is there and not empty; name a new folder"),
        (["again"], 2, "is quantised already"),
        (["nosuch"], 1, "neither a folder nor in the Hugging Face cache"),
    ],
)
def test_what_cannot_be_made_is_said_and_leaves_nothing(original, packed, tmp_path, capsys, words, code, said):
    model, out = str(original), tmp_path / "out"
    if words == ["there"]:
        out.mkdir()
        (out / "file").touch()
    elif words == ["again"]:
        model = str(packed)
    elif words == ["nosuch"]:
        model = "no/such"
    options = words if words[0].startswith("--") else []
    assert main(["quantize", model, str(out), *options]) == code
    assert said in " ".join(capsys.readouterr().err.split())
    assert [each.name for each in tmp_path.iterdir()] == (["out"] if words == ["there"] else [])


def test_what_came_there_meanwhile_stays(tmp_path):
    theirs = tmp_path / "out" / "theirs"
    with pytest.raises(OSError, match="not empty"), appearing(tmp_path / "out") as unfinished:  # noqa: PT012
        (unfinished / "ours").touch()
        theirs.parent.mkdir()
        theirs.touch()
    assert [*tmp_path.rglob("*")] == [theirs.parent, theirs]
