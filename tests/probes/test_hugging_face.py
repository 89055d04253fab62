"""Nets of Hugging Face from tiny configurations with random weights: every row against hooks by hand."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.probes.by_hand import WORDS, differences, flat, numbers, snapshot, watch
from tests.probes.flow import misplaced

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages, about each other

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 31}
ROPE = {"max_position_embeddings": 32, "num_key_value_heads": 1}


def ids(n: int = 4, length: int = 7) -> Tensor:
    return torch.randint(5, 31, (n, length), generator=torch.Generator().manual_seed(1))


def build(name: str, attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    kind, own = {
        "bert": ("Bert", {**SMALL, "max_position_embeddings": 32, "num_labels": 3}),
        "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 31}),
        "llama": ("Llama", {**SMALL, **ROPE}),
        "mixtral": ("Mixtral", {**SMALL, **ROPE, "num_local_experts": 3, "num_experts_per_tok": 2}),
        "t5": ("T5", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 31}),
        "bart": (
            "Bart",
            {
                "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 31,
                "max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
                "decoder_start_token_id": 2,
            },
        ),
        "vit": (
            "ViT",
            {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 3},
        ),
    }[name]  # fmt: skip
    head = {
        "bert": "ForSequenceClassification", "gpt2": "LMHeadModel", "llama": "ForCausalLM", "mixtral": "ForCausalLM",
        "t5": "ForConditionalGeneration", "bart": "ForConditionalGeneration", "vit": "ForImageClassification",
    }[name]  # fmt: skip
    extra = {"decoder_start_token_id": 0} if name == "t5" else {}
    config = getattr(transformers, f"{kind}Config")(**own, **extra, attn_implementation=attention)
    return getattr(transformers, f"{kind}{head}")(config)


def batch(name: str) -> dict[str, Tensor]:
    if name == "vit":
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        return {"pixel_values": images, "labels": torch.arange(4) % 3}
    labels = torch.arange(4) % 3 if name == "bert" else ids()
    return {"input_ids": ids(), "attention_mask": torch.ones(4, 7, dtype=torch.long), "labels": labels}


def last_axis(name: str, x: Tensor) -> int:
    """All but the convolution that cuts an image into patches have their units in the last dimension."""
    return 1 if name.endswith("projection") else x.ndim - 1


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], name: str) -> Tensor:
    optimizers[0].zero_grad()
    loss: Tensor = model(**batch(name)).loss
    loss.backward()
    optimizers[0].step()
    return loss


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "t5", "bart", "vit"])
def test_every_module_and_parameter_has_its_row(name: str) -> None:
    """Calls by keyword with labels, outputs that are `ModelOutput`, dropout at work."""
    watch(build(name).train(), lambda m, o: train(m, o, name), axis=last_axis).check()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_pass_alone(name: str, attention: str) -> None:
    model = build(name, attention).eval()
    seen = snapshot(model, batch(name), loss=lambda out: out.loss, axis=last_axis)
    seen.check()
    assert not misplaced(seen)
    expected = "softmax" if attention == "eager" else "scaled_dot_product_attention"
    rows = seen.rows[(seen.rows["tensor"] == "attention") & (seen.rows["direction"] == "forward")]
    assert set(rows["op"]) == {expected}


CHECKPOINTS = [(name, reentrant) for name in ("gpt2", "llama", "bert") for reentrant in (True, False)]


def compare_checkpointed(name: str, reentrant: bool, columns: list[str]) -> None:
    """Rows of a training step with checkpoints and without; what is computed twice has calls of its own."""
    found = []
    for checked in (False, True):
        model = build(name).train()
        model.config.use_cache = False
        if checked:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        rows = watch(model, lambda m, o: train(m, o, name), steps=1).rows
        assert not rows.duplicated(WORDS).any()
        rows = rows[(rows["op"] != "input") & (rows["name"] != "")]
        found.append(rows.groupby(["name", "part", "tensor", "direction"], observed=True)[columns].agg(set))
    plain, other = found
    differing = {key for key in plain.index if key not in other.index or not (plain.loc[key] == other.loc[key]).all()}
    assert not differing, sorted(differing)[:10]


@pytest.mark.parametrize(("name", "reentrant"), CHECKPOINTS)
def test_gradient_checkpoints_change_no_number(name: str, reentrant: bool) -> None:
    compare_checkpointed(name, reentrant, ["rms", "min", "max"])


def test_gradient_checkpoints_change_no_layer() -> None:
    compare_checkpointed("bert", False, ["layer"])


def test_the_residual_stream_of_gpt2() -> None:
    """Both sums of every block, as the norms above them get them."""
    model = build("gpt2").eval()
    rows = snapshot(model, {"input_ids": ids()}).rows
    rows = rows[(rows["tensor"] == "stream") & (rows["direction"] == "forward")]
    inputs: dict[str, Tensor] = {}
    for k, block in enumerate(model.transformer.h):
        for name in ("ln_1", "ln_2"):
            keep = partial(lambda key, m, args: inputs.update({key: args[0]}), f"{k}.{name}")
            getattr(block, name).register_forward_pre_hook(keep)
    model.transformer.ln_f.register_forward_pre_hook(lambda m, args: inputs.update({"2.ln_1": args[0]}))
    model(input_ids=ids())
    spread = [float(inputs[f"{k}.ln_1"].double().std(correction=0)) for k in range(3)]
    assert spread == sorted(spread)  # it grows
    for k in range(2):
        for part, x in (("add", inputs[f"{k}.ln_2"]), ("add.1", inputs[f"{k + 1}.ln_1"])):
            row = rows[(rows["name"] == f"transformer.h.{k}") & (rows["part"] == part)]
            assert len(row) == 1 and not differences(row.iloc[0], numbers(x, 2))


def test_the_residual_stream_of_llama_and_its_norms_by_hand() -> None:
    """RMSNorm of Hugging Face is a class of its own; SwiGLU's gate is a SiLU."""
    model = build("llama").eval()
    rows = snapshot(model, {"input_ids": ids()}).rows
    forward = rows[rows["direction"] == "forward"]
    hidden = model(input_ids=ids(), output_hidden_states=True).hidden_states
    norms = forward[forward["name"].str.endswith("norm") & (forward["part"] == "")]
    assert len(norms) == 5
    for k in range(2):
        found = forward[(forward["name"] == f"model.layers.{k}") & (forward["tensor"] == "stream")]
        if k == 0:  # the last of hidden_states is behind the norm
            assert not differences(found.iloc[-1], numbers(hidden[1], 2))
        layer = model.model.layers[k]
        gate = layer.mlp.act_fn(layer.mlp.gate_proj(torch.zeros(1, 16)))
        assert gate.shape == (1, 24)
        name = f"model.layers.{k}.mlp.act_fn"
        assert set(forward.loc[forward["name"] == name, "tensor"]) == {"activation"}


GATES = {
    "gpt2": ("transformer.h.{}.mlp.c_fc", "transformer.h.0.mlp.act"),
    "bert": ("bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.0.intermediate.intermediate_act_fn"),
    "llama": ("model.layers.{}.mlp.gate_proj", "model.layers.0.mlp.act_fn"),
    "t5": ("encoder.block.{}.layer.1.DenseReluDense.wi", "encoder.block.0.layer.1.DenseReluDense.act"),
}


@pytest.mark.parametrize("name", GATES)
def test_layers_below_activations_say_their_saturated_share(name: str) -> None:
    """Classes of Hugging Face's, by formula and by function: |phi'| below 5 % of its largest, by torch.autograd."""
    layers, activation = GATES[name]
    model = build(name).eval()
    for k in range(2):
        model.get_submodule(layers.format(k)).weight.data.mul_(60)  # far into the flat parts
    rows = snapshot(model, batch(name)).rows
    act = model.get_submodule(activation)
    grid = torch.linspace(-20, 20, 200001, dtype=torch.float64).requires_grad_()
    (slopes,) = torch.autograd.grad(act(grid).sum(), grid)
    for k in range(2):
        caught: list[Tensor] = []
        handle = model.get_submodule(layers.format(k)).register_forward_hook(
            lambda m, args, out, caught=caught: caught.append(out.detach().double())
        )
        model(**batch(name))
        handle.remove()
        z = caught[0].requires_grad_()
        (slope,) = torch.autograd.grad(act(z).sum(), z)
        share = float((slope.abs() < 0.05 * slopes.abs().max()).double().mean())
        own = rows[
            rows["name"].eq(layers.format(k)) & rows["tensor"].eq("preactivation") & rows["direction"].eq("forward")
        ]
        assert share > 0.1
        # a share of counted entries; an entry at the very edge in float32 may fall on either side
        assert float(own["frac_saturated"].iloc[0]) == pytest.approx(share, abs=2 / z.numel())


def test_attention_logits_and_weights_of_bert() -> None:
    model = build("bert").eval()
    rows = snapshot(model, batch("bert")).rows
    found = rows[rows["op"].eq("softmax") & rows["direction"].eq("forward")]
    weights = model(**batch("bert"), output_attentions=True).attentions
    attention = found[found["tensor"] == "attention"]
    assert len(attention) == 2 and len(found[found["tensor"] == "logits"]) == 2
    for (_, row), x in zip(attention.iterrows(), weights, strict=True):
        assert not differences(row, numbers(flat(x), 1))


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5"])
def test_a_tied_embedding_has_one_row(name: str) -> None:
    model = build(name)
    rows = snapshot(model, batch(name), loss=lambda out: out.loss).rows
    tied = model.get_input_embeddings().weight
    forward = rows[rows["tensor"].eq("weight") & rows["direction"].eq("forward")]
    same = forward[(forward["count"] == tied.numel()) & ((forward["rms"] - numbers(tied)["rms"]).abs() < 1e-9)]
    assert len(same) == 1
    distinct = {id(p) for p in model.parameters()}
    assert len(rows[rows["tensor"].isin(["weight", "bias"]) & rows["direction"].eq("forward")]) == len(distinct)


def test_the_weights_of_conv1d_are_weights_of_a_layer() -> None:
    """GPT-2 keeps (in, out): preactivations of its own number, beside its weight and bias."""
    rows = snapshot(build("gpt2"), batch("gpt2"), loss=lambda out: out.loss).rows
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        own = rows[(rows["name"] == name) & (rows["direction"] == "forward")]
        words = dict(zip(own["part"], own["tensor"], strict=True))
        assert words.pop("weight") == "weight" and words.pop("bias") == "bias"
        assert set(words.values()) == {"preactivation"}
        assert own["layer"].nunique() == 1


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_only_residual_sums_are_the_stream(name: str) -> None:
    """Every tensor that is called so has the shape of the embedded words, and is no part of an attention."""
    rows = snapshot(build(name).eval(), batch(name)).rows
    stream = rows[rows["tensor"].eq("stream") & rows["direction"].eq("forward")]
    assert set(stream["count"]) <= {4 * 7 * 16, 4 * 16} and not stream["name"].str.contains("act|rotary").any()
