"""Packed 2:4 matrices, layers and models on CPU, against the dense forms they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
import tiny
import torch
from patterns import two_of_four
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.kernels import eligibility, linear24, sparse24
from llmprune.kernels.linear24 import Packed24, SparseLinear24, join
from llmprune.sparse import PACKED, survey
from llmprune.types import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 4), (3, 8), (5, 12), (16, 64), (7, 100)])
def test_packing_is_exact(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight = two_of_four(outputs, inputs, dtype)
    values, metadata = sparse24.pack24(weight)
    assert values.shape == (outputs, inputs // 2) and metadata.shape == (outputs, -(-inputs // 8))
    assert torch.equal(bits(sparse24.unpack24(values, metadata)), bits(weight))


def test_layout_is_the_documented_one() -> None:
    # one group of every pair of columns: the nibble is first | second << 2, lower group in the lower nibble
    pairs = list(itertools.combinations(range(4), 2))
    weight = torch.zeros(1, 24)
    for group, (first, second) in enumerate(pairs):
        weight[0, 4 * group + first], weight[0, 4 * group + second] = 10.0 + group, 20.0 + group
    values, metadata = sparse24.pack24(weight)
    assert values.tolist() == [[value for group in range(6) for value in (10.0 + group, 20.0 + group)]]
    nibbles = [first | second << 2 for first, second in pairs]
    assert metadata.tolist() == [[low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]]


def test_groups_with_fewer_weights_and_special_values() -> None:
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 5], [nan, 0, 0, -inf], [0, -0.0, 0, 3], [1e-45, 0, 0, 0]])
    values, metadata = sparse24.pack24(weight)
    assert torch.equal(bits(sparse24.unpack24(values, metadata)), bits(weight))


def test_packed_bytes_are_nine_sixteenths() -> None:
    weight = two_of_four(64, 256, torch.bfloat16)
    assert sum(one.numel() * one.element_size() for one in sparse24.pack24(weight)) == 0.5625 * 64 * 256 * 2


def test_what_is_not_two_of_four_is_refused_with_the_reason() -> None:
    weight = two_of_four(8, 16)
    weight[2, 4:7] = 1
    with pytest.raises(ValueError, match="1 of its groups of 4 keep more than 2"):
        sparse24.pack24(weight)
    with pytest.raises(ValueError, match="6 inputs are no multiple of 4"):
        sparse24.pack24(torch.zeros(2, 6))
    assert sparse24.why_not_24(two_of_four(8, 16)) is None


@pytest.mark.parametrize("stripe", [1, 70, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_in_stripes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stripe: int) -> None:
    monkeypatch.setattr(sparse24, "STRIPE", stripe)
    weight, x = two_of_four(9, 20, dtype), torch.randn(6, 20).to(dtype)
    found = sparse24.matmul24(x, *sparse24.pack24(weight))
    exact = x.double() @ weight.double().T
    # one rounding of the result, and 20 float32 sums
    bound = exact.abs() * torch.finfo(dtype).eps + 20 * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T)
    assert found.dtype == dtype
    assert bool(((found.double() - exact).abs() <= bound).all())


def test_operators_are_well_formed() -> None:
    values, metadata = sparse24.pack24(two_of_four(8, 16))
    x = torch.randn(3, 16, requires_grad=True)
    torch.library.opcheck(sparse24.matmul24, (x, values, metadata))
    torch.library.opcheck(sparse24.input_gradient24, (torch.randn(3, 8), values, metadata))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16)])
def test_layer_and_its_gradients(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(16, 8, bias=bias)
    linear.weight.data = two_of_four(8, 16)
    packed = SparseLinear24.from_linear(linear)
    torch.manual_seed(0)
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 8)
    inputs = [x] if linear.bias is None else [x, linear.bias]
    expected = [linear(x), *torch.autograd.grad(linear(x), inputs, grad)]
    found = [packed(x), *torch.autograd.grad(packed(x), inputs, grad)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # both are float32 sums of at most 16 terms


def test_layer_compiles_without_a_break() -> None:
    linear = nn.Linear(32, 8)
    linear.weight.data = two_of_four(8, 32)
    packed = SparseLinear24.from_linear(linear)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 32, requires_grad=True)
    torch.testing.assert_close(compiled(x), packed(x))
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(4, 32), rtol=1e-5, atol=1e-6)


def test_state_dict_is_that_of_a_linear_layer() -> None:
    linear = nn.Linear(16, 8)
    linear.weight.data = two_of_four(8, 16)
    packed = SparseLinear24.from_linear(linear)
    assert set(packed.state_dict()) == {"weight", "bias"}
    assert torch.equal(packed.state_dict()["weight"], linear.weight)
    other = {"weight": two_of_four(8, 16, seed=1), "bias": torch.ones(8)}
    packed.load_state_dict(other)
    assert torch.equal(packed.weight, other["weight"]) and torch.equal(packed.bias, other["bias"])
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        packed.load_state_dict({"bias": torch.ones(8)})


def attention_like(biases: bool = False) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Three layers of one input, dense, and the same packed and joined."""
    dense = nn.ModuleDict({name: nn.Linear(16, rows, biases) for name, rows in (("q", 12), ("k", 4), ("v", 8))})
    for seed, layer in enumerate(dense.values()):
        layer.weight.data = two_of_four(layer.out_features, 16, seed=seed)
    packed = nn.ModuleDict({name: SparseLinear24.from_linear(layer) for name, layer in dense.items()})
    join(list(packed.values()))
    return dense, packed


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of outputs at every packed product."""
    seen: list[int] = []
    matmul = linear24.matmul24

    def counted(x: torch.Tensor, values: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(len(values))
        return matmul(x, values, *rest)

    monkeypatch.setattr(linear24, "matmul24", counted)
    return seen


@pytest.mark.parametrize("biases", [False, True])
def test_joined_layers_share_one_product(monkeypatch: pytest.MonkeyPatch, biases: bool) -> None:
    dense, packed = attention_like(biases)
    seen = products(monkeypatch)
    for _ in range(2):
        x = torch.randn(2, 3, 16)
        for name, layer in packed.items():
            torch.testing.assert_close(layer(x), dense[name](x), rtol=1e-5, atol=1e-6)  # 16 terms in float32
    assert seen == [24, 24]
    assert packed["q"].packed is packed["v"].packed and packed["q"].packed._last is None
    state = packed.state_dict()
    assert state.keys() == dense.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in dense.state_dict().items())


def test_joined_layers_with_different_inputs_are_right_all_the_same() -> None:
    dense, packed = attention_like()
    x, other = torch.randn(3, 16), torch.randn(3, 16)
    for name, given in (("q", x), ("k", other), ("v", x), ("v", x), ("q", other)):
        torch.testing.assert_close(packed[name](given), dense[name](given), rtol=1e-5, atol=1e-6)


def test_joined_layers_compile_and_train() -> None:
    dense, packed = attention_like()

    def total(layers: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        return (layers["q"](x).sum(-1) * layers["k"](x).sum(-1) + layers["v"](x).sum(-1)).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    gradients = []
    for function, layers in ((total, dense), (total, packed), (compiled, packed)):
        x = torch.linspace(-1, 1, 48).view(3, 16).requires_grad_()
        function(layers, x).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[2], gradients[1])


def test_many_tokens_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of cuSPARSELt with what it documents: first factor sparse, 8 tokens at a time, stored transposed."""
    weight = two_of_four(32, 64, torch.bfloat16)

    def product(sparse: torch.Tensor, dense: torch.Tensor, *, transpose_result: bool) -> torch.Tensor:
        assert transpose_result and dense.shape[1] % 8 == 0 and dense.T.is_contiguous()
        return (sparse.float() @ dense.float()).T.to(sparse.dtype).contiguous()

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(eligibility.tuned, "name_of", lambda device: "default")
    compressed = sparse24.compress24(weight)
    x = torch.randn(67, 64).bfloat16()
    found = sparse24.matmul24_cusparselt(x, *sparse24.pack24(weight), compressed)
    torch.testing.assert_close(found, (x.float() @ weight.float().T).bfloat16())
    packed = sparse24.pack24(weight)
    assert "more than 64" in str(eligibility.prefill_cusparselt(x[:64], *packed, compressed))
    assert "not kept" in str(eligibility.prefill_cusparselt(x, *packed, None))
    assert eligibility.prefill_cusparselt(x, *packed, compressed) is None
    assert "fewer than the 512" in str(eligibility.cusparselt_is_faster(x, *packed, compressed))
    assert "on cuda, not on cpu" in str(eligibility.cusparselt(x.device))
    assert "40 is no multiple of 16" in str(eligibility.cusparselt_matrix(torch.empty(16, 20).half()))


# Whole models.


def pruned(tmp_path: Path, name: str = "llama") -> Path:
    """A tiny model with all decoder matrices 2:4 but the first layer's q_proj."""
    out = tmp_path / f"{name}-24"
    if not out.exists():
        source = tiny.save(name, tmp_path / name)
        llmprune.prune(source, out=out, method="magnitude", pattern="2:4", ignore=["re:.*layers.0.self_attn.q_proj"])
    return out


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens(2, 12)).logits


def test_accelerated_model_computes_the_same(tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(pruned(tmp_path)).eval()
    expected = logits(dense)
    text = dense.generate(tiny.tokens(1, 5), max_new_tokens=8, do_sample=False)
    reasons = survey(dense)
    model = llmprune.accelerate(dense)
    assert model is dense
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    assert set(left) == {"model.layers.0.self_attn.q_proj", "lm_head"}
    swapped = {name for name, module in model.named_modules() if isinstance(module, SparseLinear24)}
    assert swapped == set(reasons) - set(left)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(tiny.tokens(1, 5), max_new_tokens=8, do_sample=False), text)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-5)
    assert llmprune.accelerate(model) is model  # nothing left to do is no error
    layer = model.model.layers[1]
    assert layer.self_attn.q_proj.packed is layer.self_attn.k_proj.packed is layer.self_attn.v_proj.packed
    assert layer.mlp.gate_proj.packed is layer.mlp.up_proj.packed is not layer.mlp.down_proj.packed
    with pytest.raises(UserError, match="prefill=True cannot be had here: cuSPARSELt computes on cuda, not on cpu"):
        llmprune.accelerate(model, prefill=True)


def test_accelerated_model_saves_the_plain_checkpoint(tmp_path: Path) -> None:
    folder = pruned(tmp_path)
    model = llmprune.load(folder, sparse=True)
    model.save_pretrained(tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert plain.keys() == again.keys() and all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma3"])
def test_packed_file_beside_the_checkpoint(tmp_path: Path, name: str) -> None:
    folder = tiny.save(name, tmp_path / name)
    if name == "llama":
        folder = pruned(tmp_path)
    else:
        llmprune.prune(folder, out=tmp_path / "out", method="magnitude", pattern="2:4", targets=["mlp", "self_attn"])
        folder = tmp_path / "out"
    packing = llmprune.load(folder, sparse=True)
    expected = logits(packing)
    path = llmprune.save_packed(packing, folder)
    assert path == folder / PACKED and not list(folder.glob("*packed*"))
    loaded = llmprune.load(folder, sparse=True)
    assert torch.equal(logits(loaded), expected)
    assert loaded.generation_config.to_dict() == packing.generation_config.to_dict()
    assert [type(one) for one in loaded.modules()] == [type(one) for one in packing.modules()]
    assert all(parameter.device.type == "cpu" for parameter in loaded.parameters())
    assert torch.equal(loaded.generate(tiny.tokens(1, 5), max_new_tokens=4, do_sample=False)[:, :5], tiny.tokens(1, 5))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected, rtol=1e-4, atol=1e-5)


def bytes_of(modules: Iterable[nn.Module]) -> int:
    tensors = [one for module in modules for one in (*module.parameters(), *module.buffers())]
    return sum({one.data_ptr(): one.nbytes for one in tensors}.values())


def test_bytes_of_a_packed_model_and_its_file(tmp_path: Path) -> None:
    """The 2:4 matrices take 0.5625 of their dense bytes, in memory and in the file; all else is as it was."""
    tiny.build("llama").bfloat16().save_pretrained(tmp_path / "dense")
    llmprune.prune(tmp_path / "dense", out=tmp_path / "out", method="magnitude", pattern="2:4")
    dense = llmprune.load(tmp_path / "out", dtype="bfloat16")
    packed = llmprune.load(tmp_path / "out", sparse=True, dtype="bfloat16")
    whole = bytes_of(one for one in dense.model.layers.modules() if isinstance(one, nn.Linear))
    parts = bytes_of(one for one in packed.modules() if isinstance(one, Packed24))
    assert parts == 0.5625 * whole
    assert bytes_of([packed]) == bytes_of([dense]) - whole + parts
    stored = load_file(llmprune.save_packed(packed, tmp_path / "out"))
    assert sum(one.nbytes for one in stored.values()) == parts


def test_stale_or_missing_packed_weights_are_refused(tmp_path: Path) -> None:
    folder = pruned(tmp_path)
    model = llmprune.load(folder, sparse=True)
    llmprune.save_packed(model, folder)
    other = tiny.build("llama", seed=5)
    with pytest.raises(UserError, match="no packed layers"):
        llmprune.save_packed(other, folder)
    other.save_pretrained(folder)
    with pytest.raises(UserError, match="made from other weights"):
        llmprune.load(folder, sparse=True)
    with pytest.raises(UserError, match=r"holds other weights of model\.layers\.0\.self_attn\.k_proj"):
        llmprune.save_packed(model, folder)
    with pytest.raises(UserError, match=r"no linear layer of the model is 2:4.*--pattern 2:4"):
        llmprune.accelerate(other)


def test_gradients_reach_the_inputs_of_an_accelerated_model(tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(pruned(tmp_path)).eval()
    ids = tiny.tokens(2, 8)
    dense(ids, labels=ids).loss.backward()
    expected = dense.get_input_embeddings().weight.grad.clone()
    dense.zero_grad()
    llmprune.accelerate(dense)(ids, labels=ids).loss.backward()
    torch.testing.assert_close(dense.get_input_embeddings().weight.grad, expected, rtol=1e-4, atol=1e-6)
