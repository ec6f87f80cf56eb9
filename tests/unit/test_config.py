"""Settings: the shipped files, overrides, and what a wrong one is told."""

import re
import tomllib
from pathlib import Path

import pytest

from clawrl.config import Config, load_config, model_path
from clawrl.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
GPUS = {"cpu": 0, "one_gpu": 1, "eight_gpu": 8}


def num_gpus(config: Config) -> float:
    engines = (config.policy, config.judge) if config.judge.engine == "own" else (config.policy,)
    return (
        sum(engine.replicas * engine.gpus_per_replica for engine in engines)
        + config.trainer.workers * config.trainer.gpus_per_worker
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_file_loads(path):
    config = load_config(path)
    for engine in (config.policy, config.judge):
        if engine.gpus_per_replica:
            assert engine.dtype != "float32", "a GPU engine in float32 wastes half of its memory"
    assert config.trainer.pack_tokens >= config.policy.max_model_len, "the longest sample must fit into one pass"
    if config.judge.engine == "own":
        assert config.judge.max_model_len >= config.policy.max_model_len, "the teacher reads the policy's prompts"


@pytest.mark.parametrize(("name", "gpus"), GPUS.items())
def test_gpu_totals_agree_with_the_file_name(name, gpus):
    assert num_gpus(load_config(CONFIGS / f"{name}.toml")) == pytest.approx(gpus)


def test_one_gpu_engines_leave_memory_to_the_trainer():
    config = load_config(CONFIGS / "one_gpu.toml")
    assert config.judge.engine == "policy"
    assert config.policy.gpu_memory_utilization <= 0.5


def test_cpu_file_states_the_defaults_and_nothing_else():
    assert load_config(CONFIGS / "cpu.toml") == load_config(None) == Config()


def test_cpu_file_shows_every_key_to_a_new_user():
    tree = tomllib.loads((CONFIGS / "cpu.toml").read_text())
    for name, section in Config():
        assert name in tree or name in ("pools", "lora")  # which have files of their own
        if isinstance(tree.get(name), dict):
            absent = {key for key, value in section if key not in tree[name] and value is not None}
            assert absent <= {"gpu_memory_utilization"}, f"[{name}] does not show {absent}"


def test_eight_gpu_file_is_the_reference_setting():
    config = load_config(CONFIGS / "eight_gpu.toml")
    assert (config.trainer.workers, config.policy.replicas, config.judge.replicas) == (4, 2, 2)
    assert (config.policy.max_model_len, config.policy.max_reply_tokens) == (32768, 8192)
    assert (config.trainer.learning_rate, config.trainer.betas, config.trainer.weight_decay) == (1e-5, (0.9, 0.98), 0.1)
    assert (config.buffer.batch_size, config.policy.temperature, config.learning.kl_weight) == (16, 0.6, 0.01)


def test_a_trailing_comment_never_hides_a_value():
    """A reader trusts that what a shipped file comments on is set: no line is a commented-out key."""
    for path in CONFIGS.glob("*.toml"):
        assert not re.search(r"^#\s*\w+\s*=\s*\S", path.read_text(), re.MULTILINE), path.name


@pytest.mark.parametrize(
    ("word", "section", "key", "value"),
    [
        ("learning.method=rl", "learning", "method", "rl"),
        ("buffer.batch_size=3", "buffer", "batch_size", 3),
        ("trainer.learning_rate=1e-4", "trainer", "learning_rate", 1e-4),
        ("trainer.betas=[0.8, 0.9]", "trainer", "betas", (0.8, 0.9)),
        ("policy.tool_parser=null", "policy", "tool_parser", None),
        ("trainer.activation_checkpointing=true", "trainer", "activation_checkpointing", True),
        ("policy.gpus_per_replica=0.5", "policy", "gpus_per_replica", 0.5),
        ("policy.gpus_per_replica=2", "policy", "gpus_per_replica", 2),
    ],
)
def test_override(word, section, key, value):
    assert getattr(getattr(load_config(None, [word]), section), key) == value


def test_overrides_reach_nested_sections_and_the_last_one_wins():
    config = load_config(CONFIGS / "cpu.toml", ["learning.clip.low=0.1", "learning.clip.low=0.3", "run_root=/tmp/x"])
    assert (config.learning.clip.low, config.learning.clip.high, config.run_root) == (0.3, 0.28, "/tmp/x")


POOLS = CONFIGS / "mixed.toml"


def test_overrides_reach_one_of_several_pools():
    config = load_config(
        POOLS, ["pools.1.seed=3", 'pools.3.options={folder="runs/swe"}', "pools.0.options.invented=1.0"]
    )
    assert [pool.seed for pool in config.pools] == [None, 3, None, None]
    assert config.pools[3].options == {"folder": "runs/swe"}
    assert config.pools[0].options["invented"] == 1.0


@pytest.mark.parametrize("word", ["pools.9.seed=3", "pools.x.seed=3", "pools.seed=3", "pools.0=3", "pools.0.name.x=3"])
def test_a_pool_that_is_not_there_is_refused(word):
    with pytest.raises(ConfigError, match=r"override|pools"):
        load_config(POOLS, [word])


def test_the_mixed_file_has_all_pools_small_and_chat_as_ever():
    config = load_config(POOLS)
    assert [pool.name for pool in config.pools] == ["toolcall", "drill", "gui", "swe"]
    assert max(pool.max_envs for pool in config.pools) <= 8
    assert config.learning == Config().learning, "people are learnt from as in cpu.toml"
    for pool in config.pools:
        assert pool.group_size <= pool.max_envs


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["learning.metod=rl"], ["learning.metod is not a key", "method", "kl_weight"]),
        (["learning.clip.hi=1"], ["learning.clip.hi is not a key", "allowed here: high, low"]),
        (["lerning.method=rl"], ["lerning is not a key", "learning"]),
        (["learning.method=ppo"], ["learning.method", '"ppo"', "'rl', 'opd' or 'hybrid'"]),
        (["learning.method=a b:c"], ["learning.method", "package.module:function"]),
        (["buffer.max_lag=0"], ["buffer.max_lag = 0", "greater than or equal to 1"]),
        (["buffer.batch_size=many"], ["buffer.batch_size", '"many"', "integer"]),
        (["learning.support=8"], ["learning.support=8", "policy.support=4", "raise policy.support"]),
        (["buffer.replay_fraction=1"], ["buffer.replay_fraction = 1", "less than 1"]),
        (["buffer.replay_fraction=0.01"], ["0.01 of batch_size=32", "replay_fraction >= 0.03125"]),
        (["buffer.replay_fraction=0.5", "journal.keep_days=7"], ["keep_days=7", "replay_fraction=0.5", "unset one"]),
        (
            ["learning.distillation=token", "learning.distillation_support=overlap"],
            ["distillation_support=overlap", "distillation=token", "set distillation=topk"],
        ),
        (
            ["learning.distillation_support=teacher", "learning.teacher_top=3"],
            ["support=4", "teacher_top=3", "raise teacher_top"],
        ),
        (["policy.max_reply_tokens=2048"], ["policy.max_reply_tokens=2048", "lower it"]),
        (["policy.gpus_per_replica=1.5"], ["policy.gpus_per_replica = 1.5", "whole number"]),
        (["policy.gpus_per_replica=inf"], ["policy.gpus_per_replica", "finite"]),
        (["trainer.gpus_per_worker=2"], ["trainer.gpus_per_worker = 2", "less than or equal to 1"]),
        (["trainer.gpus_per_worker=0.5"], ["trainer", "workers=2", "NCCL"]),
        (["policy.model=/a/b"], ["judge.model='clawrl:tiny'", "learning.kl_weight=0"]),
        (["gateway"], ["'gateway'", "section.key=value"]),
        (["=3"], ["section.key=value"]),
        (["run_root.x=3", "run_root.x.y=3"], ["'x' is not a section"]),
    ],
)
def test_a_wrong_override_is_refused_with_key_and_remedy(words, told):
    with pytest.raises(ConfigError) as caught:
        load_config(None, words)
    for part in told:
        assert part in str(caught.value)


def test_a_wrong_file_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[buffer]\nbatchsize = 3\n")
    with pytest.raises(ConfigError, match=r"mine\.toml.*buffer\.batchsize is not a key; allowed here: batch_size"):
        load_config(path)
    path.write_text("[buffer\n")
    with pytest.raises(ConfigError, match=r"mine\.toml is not valid TOML"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"mine\.toml is not valid TOML"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"absent\.toml cannot be read: No such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_a_long_wrong_value_is_shortened():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["learning.method=" + "x" * 5000])
    assert len(str(caught.value)) < 400


def test_other_models_are_free_where_the_judge_scores_nothing():
    words = ["policy.model=/a/b", "learning.teacher=current", "learning.kl_weight=0"]
    assert load_config(None, words).policy.model == "/a/b"
    assert load_config(None, ["policy.model=/a/b", "learning.method=rl", "learning.kl_weight=0"])


def test_a_section_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        Config().buffer.batch_size = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_model_path(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert model_path(str(tmp_path)) == str(tmp_path.resolve())
    assert model_path("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    for absent in (str(tmp_path / "nothing"), "./nothing", "clawrl:nothing"):
        with pytest.raises(ConfigError, match=r"nothing.* is not a model folder"):
            model_path(absent)


def test_a_models_folder_is_the_same_one_from_anywhere(tmp_path, monkeypatch):
    """Ray Train's workers have a working directory of their own."""
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in ("models/mine", "./models/mine", str(folder)):
        config = load_config(None, [f"policy.model={name}", f"judge.model={name}"])
        assert config.policy.model == config.judge.model == str(folder.resolve())
    assert (
        load_config(None, ["policy.model=Qwen/Qwen3-4B", "judge.model=Qwen/Qwen3-4B"]).policy.model == "Qwen/Qwen3-4B"
    )
    assert load_config(None, []).policy.model == "clawrl:tiny"


def test_the_policys_engine_judges_only_where_versions_are_adapters():
    with pytest.raises(ConfigError, match=r"judge\.engine=policy .*add a \[lora\] section"):
        load_config(None, ["judge.engine=policy"])
    config = load_config(None, ["judge.engine=policy", "lora.rank=8", "policy.model=some/model"])
    assert config.lora is not None
    assert config.lora.rank == 8
    with pytest.raises(ConfigError, match=r"learning\.teacher=ema .*add one \(lora\.rank=16\), or set .*frozen"):
        load_config(None, ["learning.teacher=ema"])
    with pytest.raises(ConfigError, match=r"lora\.in_batch=3 is too little .* set lora\.in_batch=4 or more"):
        load_config(None, ["learning.teacher=ema", "lora.in_batch=3"])
    assert load_config(None, ["learning.teacher=ema", "lora.rank=8"]).learning.ema_decay == 0.95
    with pytest.raises(ConfigError, match=r"lora\.ranks is not a key; allowed here: alpha, anchor, in_batch, "):
        load_config(None, ["lora.ranks=8"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["lora.policy_scope=mine"], r"lora\.policy_scope = \"mine\""),
        (["lora.policy_scope=user", "trainer.checkpoint_every=4"], r"set trainer\.checkpoint_every=1"),
        (["lora.in_memory=8"], r"in_memory=8 is less than in_batch=16"),
        (["buffer.user_quota=4"], r"set min_batch too"),
        (["buffer.user_weights.ann=0"], r"user_weights\.ann"),
    ],
)
def test_policies_of_users_that_cannot_be(words, why):
    with pytest.raises(ConfigError, match=why):
        load_config(None, words)


def test_environments_need_a_policy_of_everyones():
    with pytest.raises(ConfigError, match=r"set lora\.policy_scope=hierarchy, or remove \[\[pools\]\]"):
        load_config(CONFIGS / "toolcall.toml", ["lora.policy_scope=user"])


def test_sessions_are_distilled_where_the_order_of_samples_does_not_matter():
    for words in ([], ["learning.method=rl"]):
        with pytest.raises(ConfigError, match=r"set learning\.method=opd, or hybrid with learning\.baseline=none"):
            load_config(None, ["learning.experience=true", *words])
    for words in (["learning.method=opd"], ["learning.baseline=none"]):
        assert load_config(None, ["learning.experience=true", *words]).learning.experience
