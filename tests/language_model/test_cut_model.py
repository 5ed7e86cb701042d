"""Hooks and cut models against the whole models of transformers, and against TransformerLens's own
activations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aen_lightning.language_model.checkpoint_files import checkpoint_keys, needed_files
from aen_lightning.language_model.cut_model import (
    build_cut_model,
    cut_model,
    load_cut_model,
    resolve_hooks,
)
from aen_lightning.language_model.families import cut_config, layers_of
from aen_lightning.language_model.hook_points import known_hooks, resolve_hook
from tests.support.tiny_models import D_MODEL, FAMILIES, N_LAYERS, save_tiny_model, tiny_config, tiny_model

IDS = torch.tensor([[5, 9, 33, 1, 8, 60, 7, 12, 4], [40, 41, 42, 43, 44, 45, 46, 47, 48]])


def module_output(model: PreTrainedModel, path: str, ids: Tensor = IDS, **kwargs: Tensor) -> Tensor:
    """What a module of the whole causal LM puts out, by a hook of our own."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _m, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(ids, use_cache=False, **kwargs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_load_cut_model_gives_the_whole_models_hidden_states_bit_for_bit(family: str, tmp_path: Path):
    folder = save_tiny_model(family, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden_states = whole(IDS, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(N_LAYERS - 1):  # the last of hidden_states has the final norm
        cut = load_cut_model(folder, [f"blocks.{layer}.hook_resid_post"])
        assert len(layers_of(cut.model)) == layer + 1
        assert torch.equal(cut.activations(IDS)[f"blocks.{layer}.hook_resid_post"], hidden_states[layer + 1])
        pre = load_cut_model(folder, [f"blocks.{layer}.hook_resid_pre"])
        assert torch.equal(pre.activations(IDS)[f"blocks.{layer}.hook_resid_pre"], hidden_states[layer])
    last = f"blocks.{N_LAYERS - 1}.hook_resid_post"
    path = resolve_hook(whole.config, last).hf_hook_name
    assert path is not None
    assert torch.equal(load_cut_model(folder, [last]).activations(IDS)[last], module_output(whole, path))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hook_is_what_transformer_lens_caches_under_its_name(family: str, tmp_path: Path):
    from transformer_lens.model_bridge import TransformerBridge

    folder = save_tiny_model(family, tmp_path)
    names = list(known_hooks(AutoConfig.from_pretrained(folder)))
    assert len(names) >= 6 * N_LAYERS + 1
    ours = load_cut_model(folder, names).activations(IDS)
    bridge = TransformerBridge.boot_transformers(folder, device="cpu")
    with torch.no_grad():
        _, theirs = bridge.run_with_cache(IDS, names_filter=names)
    for name, x in ours.items():
        # the bridge computes attention eagerly, transformers by SDPA: the same up to rounding
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(x.abs().max())}
        torch.testing.assert_close(
            x, theirs[name].reshape(x.shape), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_hook_name_is_the_module_of_the_causal_lm_that_puts_the_activation_out(family: str):
    whole = tiny_model(family)
    hooks = known_hooks(whole.config)
    ours = cut_model(whole, list(hooks)).activations(IDS)
    named = {name: hook.hf_hook_name for name, hook in hooks.items() if hook.hf_hook_name}
    assert f"blocks.{N_LAYERS - 1}.hook_mlp_out" in named
    for name, path in named.items():
        assert torch.equal(ours[name], module_output(whole, path).reshape(ours[name].shape)), name
        # and the path leads back to the hook; resid_pre shares its module with the block below
        back = resolve_hook(whole.config, path).hook_name
        assert back == name or name.endswith("hook_resid_pre") or name == "hook_embed"


def test_a_module_path_without_a_transformer_lens_name_is_read_with_its_width():
    whole = tiny_model("llama")
    hook = resolve_hook(whole.config, "model.layers.2.mlp.up_proj")
    assert (hook.hook_name, hook.layer, hook.d_in) == ("model.layers.2.mlp.up_proj", 2, 24)
    ours = cut_model(whole, [hook.hook_name]).activations(IDS)[hook.hook_name]
    assert torch.equal(ours, module_output(whole, hook.hook_name))


@pytest.mark.parametrize("model_type", ["stablelm", "olmo2", "bloom"])
def test_module_paths_work_in_families_we_do_not_list(model_type: str):
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, num_hidden_layers=3, intermediate_size=24, **sizes)
    whole = AutoModelForCausalLM.from_config(config).eval()
    path = "transformer.h.1" if model_type == "bloom" else "model.layers.1"
    cut = cut_model(whole, [path])
    assert len(layers_of(cut.model)) == 2
    assert torch.equal(cut.activations(IDS)[path], module_output(whole, path))
    with pytest.raises(
        ValueError, match=f"known for gpt2, .* of type '{model_type}' give the path of a module"
    ):
        resolve_hook(config, "blocks.1.hook_resid_post")


def test_several_hooks_mask_and_positions_reach_the_model():
    whole = tiny_model("llama")
    names = ["model.layers.0", "blocks.2.attn.hook_z", "blocks.1.hook_out"]
    cut = cut_model(whole, names)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5, 6], list(range(9))])
    acts = cut.activations(IDS, attention_mask=mask, position_ids=positions)
    assert {k: v.shape[-1] for k, v in acts.items()} == {
        "blocks.0.hook_resid_post": D_MODEL, "blocks.2.attn.hook_z": 24, "blocks.1.hook_resid_post": D_MODEL,
    }  # fmt: skip
    expected = module_output(whole, "model.layers.1", attention_mask=mask, position_ids=positions)
    assert torch.equal(acts["blocks.1.hook_resid_post"], expected)
    assert not torch.equal(expected, module_output(whole, "model.layers.1"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_cut_model_leaves_the_given_model_whole(family: str):
    whole = tiny_model(family)
    with torch.no_grad():
        before = whole(IDS).logits
    cut = cut_model(whole, ["blocks.1.hook_resid_post"])
    assert len(layers_of(cut.model)) == 2
    assert len(layers_of(whole.base_model)) == whole.config.num_hidden_layers == N_LAYERS
    with torch.no_grad():
        assert torch.equal(whole(IDS).logits, before)


def test_upper_layers_and_head_are_neither_loaded_nor_read_from_disk(tmp_path: Path):
    folder = Path(save_tiny_model("llama", tmp_path, max_shard_size="6KB", tie_word_embeddings=False))
    name = "blocks.1.hook_resid_post"
    expected = load_cut_model(str(folder), [name]).activations(IDS)[name]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    needed = set(needed_files(config, 1, index["weight_map"]))
    unneeded = set(index["weight_map"].values()) - needed
    assert index["weight_map"]["model.layers.3.mlp.up_proj.weight"] in unneeded
    assert index["weight_map"]["lm_head.weight"] in unneeded
    for file in unneeded:
        (folder / file).unlink()
    with pytest.raises((OSError, FileNotFoundError)):
        AutoModelForCausalLM.from_pretrained(folder)
    cut = load_cut_model(str(folder), [name])
    assert torch.equal(cut.activations(IDS)[name], expected)
    assert cut.model.name_or_path == str(folder)
    keys = set(cut.model.state_dict())
    assert not any("lm_head" in k or "layers.2" in k or "layers.3" in k or k.startswith("norm") for k in keys)


def test_the_model_is_frozen_in_eval_mode_and_keeps_no_cache(tmp_path: Path):
    cut = load_cut_model(save_tiny_model("gpt2", tmp_path), ["blocks.1.hook_resid_post"], dtype="bfloat16")
    assert not cut.model.training
    assert not any(p.requires_grad for p in cut.model.parameters())
    assert cut.model.config.use_cache is False
    activations = cut.activations(IDS)["blocks.1.hook_resid_post"]
    assert activations.dtype == torch.bfloat16
    assert not activations.is_inference()  # an SAE has to be able to save it for backward


def test_missing_weights_are_an_error_and_unread_ones_are_no_news(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from safetensors.torch import load_file, save_file

    folder = Path(save_tiny_model("llama", tmp_path))
    load_cut_model(str(folder), ["blocks.1.hook_resid_post"])
    assert "LOAD REPORT" not in caplog.text
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .* e\.g\. 'layers\.0\.mlp\.up_proj\.weight'"):
        load_cut_model(str(folder), ["blocks.1.hook_resid_post"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt"])
def test_checkpoint_keys_say_where_the_weights_of_a_meta_model_lie(family: str):
    whole = tiny_model(family)
    hooks = resolve_hooks(whole.config, ["blocks.1.hook_resid_post"])
    with torch.device("meta"):
        empty = build_cut_model(whole.config, hooks)
    assert all(p.is_meta for p in empty.parameters())
    causal, base = whole.state_dict(), whole.base_model.state_dict()
    for checkpoint in (causal, base):  # saved from the causal LM, or from the base model as GPT-2 on the Hub
        keys = checkpoint_keys(empty, checkpoint.keys())
        assert len(keys) == len(empty.state_dict())
        assert all(torch.equal(checkpoint[key], base[name]) for name, key in keys.items())
    with pytest.raises(ValueError, match="has neither"):
        checkpoint_keys(empty, [k for k in causal if "layers.1" not in k and "h.1" not in k])


def test_cut_config_cuts_per_layer_lists_and_copies():
    config = tiny_config("gemma3_text")
    assert len(config.layer_types) == N_LAYERS
    cut = cut_config(config, 1)
    assert cut.num_hidden_layers == len(cut.layer_types) == 2
    assert config.num_hidden_layers == len(config.layer_types) == N_LAYERS
    with pytest.raises(ValueError, match=r"from 0 to 3 \(the model has 4 layers\), got 4"):
        cut_config(config, 4)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        (
            "llama",
            "blocks.4.hook_resid_post",
            "does not exist: the model has 4 layers, so blocks.0 to blocks.3",
        ),
        ("llama", "blocks.1.hook_resid_pots", "Did you mean blocks.1.hook_resid_post"),
        ("llama", "model.layer.1", "Did you mean model.layers.1"),
        ("llama", "layers.1", "Did you mean model.layers.1"),
        ("llama", "model.layers.7", "the model has 4 layers, numbered 0 to 3"),
        ("llama", "model.norm", "lies outside the decoder blocks model.layers.0 to .3"),
        ("llama", "lm_head", "does not exist in a llama model with 4 layers"),
        ("gpt_neox", "blocks.1.hook_resid_mid", "attention and MLP are parallel"),
        ("opt_projected", "blocks.1.hook_resid_mid", "its norms come after"),
    ],
)
def test_resolve_hook_names_what_is_wrong(family: str, name: str, message: str):
    with pytest.raises(ValueError, match=message):
        resolve_hook(tiny_config(family), name)


def test_multimodal_configs_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'gemma3' states no num_hidden_layers.*text-only"):
        resolve_hook(AutoConfig.for_model("gemma3"), "blocks.1.hook_resid_post")


def test_resolve_hooks_refuses_none_and_twice_the_same():
    config = tiny_config("llama")
    with pytest.raises(ValueError, match="at least one hook name"):
        resolve_hooks(config, [])
    with pytest.raises(ValueError, match=r"name 'blocks\.1\.hook_resid_post' twice"):
        resolve_hooks(config, ["blocks.1.hook_resid_post", "model.layers.1"])


@pytest.mark.parametrize("name", ["dtype", "torch_dtype", "revision", "config"])
def test_load_cut_model_refuses_a_keyword_it_has_an_argument_for(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"cannot hold '{name}'"):
        load_cut_model(str(tmp_path), ["x"], model_from_pretrained_kwargs={name: "float32"})


def test_load_cut_model_passes_other_keywords_on(tmp_path: Path):
    folder = save_tiny_model("llama", tmp_path)
    kwargs = {"attn_implementation": "eager", "device_map": {"": "cpu"}}
    cut = load_cut_model(folder, ["blocks.1.hook_resid_post"], model_from_pretrained_kwargs=kwargs)
    assert cut.model.config._attn_implementation == "eager"
    assert load_cut_model(folder, ["blocks.1.hook_resid_post"]).model.config._attn_implementation == "sdpa"


def test_cut_model_is_not_a_module():
    cut = cut_model(tiny_model("llama"), ["blocks.1.hook_resid_post"])
    assert not isinstance(cut, nn.Module)


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_tl_model_reads_transformer_lens_models(kind: str, tmp_path: Path):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from aen_lightning.language_model.transformer_lens import TLModel, load_tl_model

    names = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]
    if kind == "bridge":
        folder = save_tiny_model("llama", tmp_path)
        model = load_tl_model("TransformerBridge", folder, names)
        expected = load_cut_model(folder, names).activations(IDS)
    else:
        torch.manual_seed(0)
        cfg = HookedTransformerConfig(
            n_layers=3,
            d_model=16,
            n_ctx=16,
            d_head=12,
            n_heads=2,
            d_vocab=64,
            act_fn="gelu",
            d_mlp=24,
            device="cpu",
        )
        hooked = HookedTransformer(cfg)
        model = TLModel(hooked, names)
        expected = {}
        hooked.run_with_hooks(
            IDS,
            fwd_hooks=[
                (n, lambda x, hook: expected.update({hook.name: x.detach().flatten(2)})) for n in names
            ],
        )
    assert [(h.hook_name, h.d_in, h.layer) for h in model.hooks] == [(names[0], 16, 1), (names[1], 24, 0)]
    acts = model.activations(IDS)
    for name in names:
        torch.testing.assert_close(acts[name], expected[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'blocks\.1\.hook_resid_pots' does not exist .* Did you mean"):
        TLModel(model.model, ["blocks.1.hook_resid_pots"])
    with pytest.raises(ValueError, match="no position_ids"):
        model.activations(IDS, position_ids=torch.zeros_like(IDS))
