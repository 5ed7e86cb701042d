"""Shards.

What is written is what is read, whole or not at all; damage is named; SAELens reads and trains on a
conversion.
"""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from torch.testing import assert_close
from transformer_lens import HookedTransformer, HookedTransformerConfig

from aen_lightning.shards import (
    Manifest,
    SAELensCache,
    ShardError,
    ShardFolder,
    ShardSet,
    ShardStream,
    convert,
    from_saelens,
    info,
    open_activations,
    require_disk,
    to_saelens,
    verify,
)
from tests.support.commands import shards_command
from tests.support.shard_sets import HOOK, flip_byte, write_set


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shard_is_plain_safetensors_with_the_rows_appended(tmp_path: Path, dtype: str):
    expected, ids = write_set(tmp_path / "set", [7, 1, 10], d_in={HOOK: 5, "b": 3}, dtype=dtype)
    files = [
        load_file(tmp_path / "set" / f"shard-0000{i}.safetensors") for i in range(3)
    ]  # safetensors' own reader
    for hook, x in expected.items():
        assert torch.equal(torch.cat([f[hook] for f in files]), x)
        assert files[0][hook].dtype == getattr(torch, dtype)
    assert torch.equal(torch.cat([f["token_ids"] for f in files]), ids)


def test_moving_tensors_together_works_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("aen_lightning.shards.write._COPY_BYTES", 7)
    expected, _ = write_set(tmp_path / "set", [50], d_in={HOOK: 5, "b": 3})
    assert torch.equal(load_file(tmp_path / "set" / "shard-00000.safetensors")["b"], expected["b"])


def test_manifest_says_what_the_set_is(tmp_path: Path):
    write_set(tmp_path / "set", [7, 1, 10])
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["n_tokens"] == 18
    assert manifest["counts"] == {"read": 21, "special": 3}
    assert [s["n_tokens"] for s in manifest["shards"]] == [7, 1, 10]
    assert manifest["metadata"]["model_name"] == "tiny"
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        ".verified.json", "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors",
    ]  # fmt: skip


def test_unfinished_shard_does_not_exist(tmp_path: Path):
    ShardFolder(tmp_path).begin(Manifest({HOOK: 2}, "float32", 4))
    stream = ShardStream(tmp_path, 0, {HOOK: 2}, "float32", 10)
    stream.append({HOOK: torch.zeros(3, 2)}, torch.zeros(3))
    assert not list(tmp_path.glob("shard-*"))
    ShardFolder(tmp_path).begin(Manifest({HOOK: 2}, "float32", 4))  # what the next run does
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
    stream.abort()


def test_append_rejects_what_does_not_fit(tmp_path: Path):
    stream = ShardStream(tmp_path, 0, {HOOK: 2}, "float32", 4)
    with pytest.raises(ValueError, match=r"must have shape \(3, 2\) beside 3 token ids, got \(3, 1\)"):
        stream.append({HOOK: torch.zeros(3, 1)}, torch.zeros(3))
    with pytest.raises(ValueError, match="room for 4 tokens, got 5"):
        stream.append({HOOK: torch.zeros(5, 2)}, torch.zeros(5))
    with pytest.raises(ValueError, match="holds hook points"):
        stream.append({"other": torch.zeros(1, 2)}, torch.zeros(1))
    stream.abort()
    assert not list(tmp_path.iterdir())


def test_folder_refuses_another_set_and_other_files(tmp_path: Path):
    ShardFolder(tmp_path / "a").begin(
        Manifest({HOOK: 2}, "float32", 4, settings={"model_name": "x", "n": (1, 2)})
    )
    ShardFolder(tmp_path / "a").begin(
        Manifest({HOOK: 2}, "float32", 4, settings={"model_name": "x", "n": (1, 2)})
    )
    with pytest.raises(ShardError, match="model_name was 'x', now 'y'"):
        ShardFolder(tmp_path / "a").begin(
            Manifest({HOOK: 2}, "float32", 4, settings={"model_name": "y", "n": (1, 2)})
        )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        ShardFolder(tmp_path / "b").begin(Manifest({HOOK: 2}, "float32", 4))


def test_set_cannot_be_marked_complete_with_a_shard_missing(tmp_path: Path):
    write_set(tmp_path, [4, 4])
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(ShardError, match=r"lacks 1 of 2 shards, e\.g\. shard-00001"):
        ShardFolder(tmp_path).collect(complete=True)


def test_incomplete_set_is_read_only_if_asked(tmp_path: Path):
    write_set(tmp_path, [4, 4])
    ShardFolder(tmp_path).collect(complete=False)
    with pytest.raises(ShardError, match="incomplete: 2 of 2 shards"):
        ShardSet(tmp_path)
    assert ShardSet(tmp_path, allow_incomplete=True).n_tokens == 8
    with pytest.raises(ShardError, match="incomplete"):
        verify(tmp_path)


def test_gather_reads_any_ascending_rows(tmp_path: Path):
    expected, ids = write_set(tmp_path, [7, 1, 10, 30], d_in={HOOK: 5, "b": 3}, dtype="bfloat16")
    source = ShardSet(tmp_path)
    rng = np.random.default_rng(0)
    for size in (1, 2, 17, 48):
        rows = np.sort(rng.choice(48, size, replace=False))
        got = source.gather(rows, [HOOK, "b"])
        for hook in got:
            assert got[hook].dtype == torch.float32
            assert torch.equal(got[hook], expected[hook][rows].float())
    assert torch.equal(source.token_ids(), ids)


@pytest.mark.parametrize("at", [-3, 20, 3])  # activations, header, header length
def test_flipped_byte_is_named_by_verify_and_by_the_reader(tmp_path: Path, at: int):
    write_set(tmp_path, [7, 9])
    ShardSet(tmp_path)  # verified once
    flip_byte(tmp_path / "shard-00001.safetensors", at)
    with pytest.raises(ShardError, match=r"shard-00001\.safetensors is damaged"):
        verify(tmp_path)
    with pytest.raises(ShardError, match=r"shard-00001\.safetensors is damaged"):
        ShardSet(tmp_path)


def test_verify_always_finds_damage_that_nothing_tells(tmp_path: Path):
    write_set(tmp_path, [7, 9])
    notes = json.loads((tmp_path / ".verified.json").read_text())
    path = tmp_path / "shard-00000.safetensors"
    flip_byte(path)
    stat = path.stat()  # as if the disk had turned the bit
    notes[path.name][2:] = [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    (tmp_path / ".verified.json").write_text(json.dumps(notes))
    ShardSet(tmp_path)
    with pytest.raises(ShardError, match="shard-00000"):
        ShardSet(tmp_path, verify="always")
    with pytest.raises(ShardError, match="shard-00000"):
        verify(tmp_path)


def test_missing_and_truncated_shards_are_named(tmp_path: Path):
    write_set(tmp_path, [7, 9])
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"shard-00001.*bytes, by the manifest"):
        ShardSet(tmp_path, verify="never")
    path.unlink()
    with pytest.raises(ShardError, match=r"shard-00001.*is missing"):
        ShardSet(tmp_path, verify="never")


def test_shard_that_disagrees_with_the_manifest_in_shape_is_named(tmp_path: Path):
    write_set(tmp_path, [6])
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["d_in"][HOOK] = 3
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match=r"shard-00000.*is \(6, 6\).*should be \(6, 3\)"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "expected a JSON object"),
        ('{"format": "x"}', "not a manifest of activations"),
        ('{"format": "aen-lightning-activations", "version": 99}', "version 99"),
        ('{"format": "aen-lightning-activations", "version": 1}', "is damaged"),
    ],
)
def test_bad_manifest_is_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=message):
        open_activations(tmp_path)


def test_open_activations_says_what_it_looked_for(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="neither our manifest"):
        open_activations(tmp_path)


def test_require_disk_refuses_what_does_not_fit(tmp_path: Path):
    free = shutil.disk_usage(tmp_path).free
    require_disk(tmp_path / "new" / "folder", free // 2)
    with pytest.raises(ShardError, match=r"needs 1\.\d TB more and its disk has [\d.]+ [GT]B free"):
        require_disk(tmp_path / "new" / "folder", free + 2**40)
    require_disk(tmp_path / "new", free + 2**40, force=True)


def test_to_saelens_rows_are_the_rows_in_order_and_the_rest_is_counted(tmp_path: Path):
    expected, ids = write_set(tmp_path / "set", [7, 1, 10, 9], context_size=4)
    done = to_saelens(tmp_path / "set", tmp_path / "cache", buffer_size_mib=0)  # one row at a time
    assert (done.n_tokens, done.n_dropped, done.dtype) == (24, 3, "float32")
    dataset = datasets.load_from_disk(str(tmp_path / "cache")).with_format("torch")
    assert torch.equal(dataset[:][HOOK].reshape(-1, 6), expected[HOOK][:24])
    assert torch.equal(dataset[:]["token_ids"].reshape(-1), ids[:24].long())


def test_to_saelens_bfloat16_becomes_float32_exactly_or_float16_and_says_so(tmp_path: Path):
    expected, _ = write_set(tmp_path / "set", [8], dtype="bfloat16")
    done = convert(tmp_path / "set", tmp_path / "f32")
    assert any("no bfloat16" in note for note in done.notes)
    assert torch.equal(SAELensCache(tmp_path / "f32").part(0)[HOOK], expected[HOOK].float())
    done = convert(tmp_path / "set", tmp_path / "f16", dtype="float16")
    assert any("rounded to float16" in note for note in done.notes)
    assert torch.equal(SAELensCache(tmp_path / "f16").part(0)[HOOK], expected[HOOK].half())
    with pytest.raises(ValueError, match="'bfloat16'"):
        to_saelens(tmp_path / "set", tmp_path / "no", dtype="bfloat16")


def test_to_saelens_refuses_a_value_that_float16_cannot_hold(tmp_path: Path):
    ShardFolder(tmp_path / "set").begin(Manifest({HOOK: 1}, "bfloat16", 2))
    stream = ShardStream(tmp_path / "set", 0, {HOOK: 1}, "bfloat16", 2)
    stream.append({HOOK: torch.tensor([[1.0], [1e5]])}, torch.zeros(2))
    stream.close()
    ShardFolder(tmp_path / "set").collect(complete=True)
    with pytest.raises(ShardError, match="does not fit float16"):
        to_saelens(tmp_path / "set", tmp_path / "cache", dtype="float16")


def test_there_and_back_again(tmp_path: Path):
    expected, ids = write_set(tmp_path / "set", [8, 4], d_in={HOOK: 5, "b": 3})
    convert(tmp_path / "set", tmp_path / "cache")
    done = convert(tmp_path / "cache", tmp_path / "back")
    source = ShardSet(done.path)
    got = source.gather(np.arange(12), [HOOK, "b"])
    assert all(torch.equal(got[h], x) for h, x in expected.items())
    assert torch.equal(source.token_ids(), ids)
    halved = from_saelens(
        tmp_path / "cache", tmp_path / "half", dtype="bfloat16", model_name="tiny", shard_size_mib=0
    )
    assert "rounded to bfloat16" in halved.notes[0]
    assert len(ShardSet(halved.path).records) == 12
    verify(halved.path)
    with pytest.raises(FileExistsError, match="not empty"):
        convert(tmp_path / "set", tmp_path / "back")


def tiny_hooked_transformer() -> HookedTransformer:
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=1,
            d_model=6,
            n_ctx=4,
            d_head=3,
            n_heads=2,
            d_vocab=50,
            act_fn="relu",
            seed=0,
            device="cpu",
        )
    )


def test_saelens_store_reads_a_converted_set(tmp_path: Path):
    expected, ids = write_set(tmp_path / "set", [30, 34], context_size=4)
    convert(tmp_path / "set", tmp_path / "cache")
    store = ActivationsStore(
        model=tiny_hooked_transformer(), dataset=None, streaming=False, hook_name=HOOK, hook_head_index=None,
        context_size=4, d_in=6, n_batches_in_buffer=4, total_training_tokens=64, store_batch_size_prompts=8,
        train_batch_size_tokens=8, prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
        dtype="float32", cached_activations_path=str(tmp_path / "cache"),
    )  # fmt: skip
    batches = [store.get_raw_llm_batch() for _ in range(2)]
    assert torch.equal(torch.cat([b[0] for b in batches]), expected[HOOK])
    assert torch.equal(torch.cat([b[1] for b in batches]).int(), ids)


@pytest.mark.slow
def test_saelens_runner_trains_on_a_converted_set(tmp_path: Path):
    write_set(tmp_path / "set", [300, 340], context_size=4)
    convert(tmp_path / "set", tmp_path / "cache")
    cfg = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=6, d_sae=12, l1_coefficient=0.1),
        hook_name=HOOK, dataset_path="unused", use_cached_activations=True, cached_activations_path=str(tmp_path / "cache"),
        context_size=4, training_tokens=1280, train_batch_size_tokens=64, store_batch_size_prompts=8, n_batches_in_buffer=32,
        lr=1e-2, device="cpu", checkpoint_path=None, output_path=str(tmp_path / "sae"), n_checkpoints=0,
        exclude_special_tokens=False, autocast=False, autocast_lm=False, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    runner = LanguageModelSAETrainingRunner(
        cfg,
        override_model=tiny_hooked_transformer(),
        override_dataset=datasets.Dataset.from_list([{"input_ids": [1, 2, 3, 4]}] * 8),
    )
    start = {k: v.clone() for k, v in runner.sae.state_dict().items()}
    sae = runner.run()
    x = ShardSet(tmp_path / "set").gather(np.arange(640), [HOOK])[HOOK]
    with torch.no_grad():
        after = (sae(x) - x).pow(2).mean()
        sae.load_state_dict(start)
        assert after < 0.8 * (sae(x) - x).pow(2).mean()


def test_our_reader_reads_what_saelens_cached(tmp_path: Path):
    """Written with the datasets library, several record batches, as SAELens's runner does it."""
    x = torch.randn(10, 4, 6)
    features = datasets.Features(
        {
            HOOK: datasets.Array2D((4, 6), "float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=4),
        }
    )
    pieces = [
        datasets.Dataset.from_dict(
            {HOOK: p.numpy(), "token_ids": torch.arange(len(p) * 4).view(-1, 4).numpy()}, features
        )
        for p in (x[:3], x[3:])
    ]
    datasets.concatenate_datasets(pieces).save_to_disk(str(tmp_path / "cache"))
    source = open_activations(tmp_path / "cache")
    assert isinstance(source, SAELensCache)
    assert (source.context_size, source.d_in, source.n_tokens) == (4, {HOOK: 6}, 40)
    rows = np.array([0, 5, 11, 12, 13, 39])
    assert_close(source.gather(rows, [HOOK])[HOOK], x.view(-1, 6)[rows], rtol=0, atol=0)
    datasets.concatenate_datasets(pieces).select([3, 1]).save_to_disk(str(tmp_path / "picked"))
    assert torch.equal(open_activations(tmp_path / "picked").part(0)[HOOK], x[[3, 1]].view(-1, 6))


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_set(tmp_path / "set", [8, 8], dtype="bfloat16")

    def run(*args: object) -> str:
        shards_command([str(a) for a in args])
        return capsys.readouterr().out

    assert "2 shards, 16 tokens: all as the manifest says" in run("verify", tmp_path / "set")
    text = run("info", tmp_path / "set")
    assert text.strip() == info(tmp_path / "set")
    assert "tokens special" in text
    assert "bfloat16" in text
    text = run("convert", tmp_path / "set", tmp_path / "cache", "--dtype", "float16")
    assert "16 tokens in float16" in text
    assert "note: bfloat16 was rounded to float16" in text
    assert "SAELens cached activations" in run("info", tmp_path / "cache")
    flip_byte(tmp_path / "set" / "shard-00001.safetensors")
    with pytest.raises(ShardError, match="shard-00001"):
        run("verify", tmp_path / "set")
