"""Every type of causal language model that transformers knows, in tiny, through the whole of llmprune.

    python scripts/zoo.py                 # all types; writes benchmarks/zoo-VERSION.md and .json
    python scripts/zoo.py llama mamba     # some types; prints only

Each type is built with random weights from its own configuration class, the sizes cut down, and saved. Then:

* engine: the column norms that the engine sees while it reads layers from disk are those of a plain forward
* sparsegpt 50 %, 2:4, wanda 50 %: from disk and in memory, by both schedules, to the same bytes; what plain
  transformers loads computes what the model in memory does
* depth: a layer less, loaded plainly; generation with the cache is that without
* experts: half of them less, where there are any
* width: a fifth of the layers' heads and channels less, where the roles of their matrices are known

A type that is no decoder-only language model must be refused with a message; it is counted apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import record
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES
from transformers.pytorch_utils import Conv1D

import llmprune
from llmprune.arch.discover import expert_blocks, find_units
from llmprune.statistics import MOMENTS, Stats
from llmprune.types import Budget, Edit, Matrix, UserError

VOCABULARY, LAYERS, MOST_PARAMETERS, SECONDS, BYTES = 128, 4, 4_000_000, 900, 6 << 30
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))

# Encoders (as decoders, some have published checkpoints; their configuration then says is_decoder), halves of
# encoder-decoders, models of sound, and heads that draft for another model.
NO_DECODERS = {
    "bart",
    "bert",
    "bert-generation",
    "big_bird",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "marian",
    "mbart",
    "megatron-bert",
    "moshi",
    "moss_transcribe_diarize",
    "musicgen",
    "musicgen_melody",
    "mvp",
    "pegasus",
    "plbart",
    "prophetnet",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "trocr",
    "whisper",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
    "xmod",
}

SIZES: dict[str, Any] = {
    size: value
    for names, value in (
        ("vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab decoder_vocab_size", VOCABULARY),
        ("unpadded_vocab_size shape_vocab_size pronunciation_vocab_size ngram_vocab_size_base", VOCABULARY),
        ("hidden_size n_embd d_model emb_dim embedding_dim lru_width dim_model_base embedding_size", 32),
        (
            "word_embed_proj_dim input_embedding_size output_embedding_size cross_attention_hidden_size ple_embed_dim",
            32,
        ),
        ("out_hidden_size projection_dim adapter_in_dim adapter_out_dim hidden_size_global adapter_input_size", 32),
        ("intermediate_size n_inner ffn_dim d_inner decoder_ffn_dim encoder_ffn_dim dff dim_ff feed_forward_size", 48),
        ("ffn_hidden_size intermediate_size_mlp dense_intermediate_size mlp_dim", 48),
        ("moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shape_embed_dim", 24),
        ("shared_experts_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size", 24),
        ("num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads", 4),
        ("encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads", 4),
        ("swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads", 4),
        ("num_key_value_heads swa_num_key_value_heads num_kv_heads kv_n_heads linear_num_key_heads", 2),
        ("head_dim kv_channels swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim", 8),
        ("dim_head d_head qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim global_head_dim rotary_dim", 8),
        ("hidden_size_per_layer_input query_pre_attn_scalar state_size mamba_d_state ssm_state_size", 8),
        ("pronunciation_embed_dim mamba_d_head mamba_head_dim attention_head_size", 8),
        ("qk_head_dim", 16),
        ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers", LAYERS),
        ("num_decoder_layers num_blocks max_window_layers depth", LAYERS),
        ("num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num", 4),
        ("num_experts_per_tok moe_topk moe_k num_experts_per_token moe_top_k", 2),
        ("n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts", 1),
        ("first_k_dense_replace num_dense_layers", 1),
        ("q_lora_rank kv_lora_rank o_lora_rank laurel_rank mamba_dt_rank time_step_rank router_hidden_size", 12),
        ("hc_lowrank adapter_rank", 12),
        ("max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length", 64),
        ("max_target_positions max_source_positions original_max_position_embeddings attention_window_size", 64),
        ("sliding_window sliding_window_size local_attention attention_chunk_size index_topk keep_window_size", 16),
        ("window_size chunk_size mamba_chunk_size block_size image_size", 16),
        ("patch_size", 8),
        ("mamba_n_heads mamba_num_heads", 8),
        ("prompt_length prompt_types segment_types", 4),
    )
    for size in names.split()
}
# Keys that may be missing or null by default and that a model then cannot be built without.
NEEDED = (
    *("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "moe_intermediate_size"),
    "n_shared_experts",
)
# One entry a layer: every kind in turn.
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "attn_layers", "block_types")
# What the sizes alone do not settle.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXED = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
FIXES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "dots3_note": {"text_config": {"per_layer_config": {}, "head_dim": 16}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 1, "intermediate_size": [48] * LAYERS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": INDEXED,
    "qwen4_exp": {"text_config": INDEXED},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}


def shrink(cls: Any, fixes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration class that make it tiny, those of its sub-configurations included."""
    default = cls()
    depth = getattr(default, "num_hidden_layers", None)
    given: dict[str, Any] = {}
    for key, value in default.to_dict().items():
        if key in getattr(cls, "sub_configs", {}):
            sub = type(getattr(default, key, None))
            if hasattr(sub, "model_type"):
                given[key] = shrink(sub, fixes.get(key, {}))
        elif key in SIZES and ((value is None and key in NEEDED) or (type(value) is int and value > 1)):
            given[key] = SIZES[key]
        elif key in BY_LAYER and value:
            kinds = list(dict.fromkeys(value))
            given[key] = [kinds[place % len(kinds)] for place in range(LAYERS)]
        elif isinstance(value, list) and len(value) == depth and depth > LAYERS:
            given[key] = value[:LAYERS]
        elif key in SPECIAL:
            given[key] = SPECIAL[key]
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    subs = getattr(cls, "sub_configs", {})
    return given | {key: value for key, value in fixes.items() if key not in subs}


def build(kind: str) -> PreTrainedModel:
    """The tiny model of a type, random in every parameter, in evaluation mode."""
    cls = CONFIG_MAPPING[kind]
    config = cls(**shrink(cls, FIXES.get(kind, {})))
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in AutoModelForCausalLM.from_config(config).named_parameters()}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    if sum(sizes.values()) > MOST_PARAMETERS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(f"{sum(sizes.values())} parameters are too many; the largest is {largest} {shapes[largest]}")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn_like(tensor)
    return model.eval()


# What is done with each of them. A check returns what is worth saying beside "ok".

Check = Callable[[PreTrainedModel, Path], str]
SEEN: dict[str, torch.Tensor] = {}


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A method that changes nothing and remembers the column norms that it was given."""

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({MOMENTS})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured",)
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = ""

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return 0

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        SEEN[matrix.name] = stats.square_sums_I
        return Edit.unchanged(matrix.weight_OI)


def engine(model: PreTrainedModel, folder: Path) -> str:
    """The engine's column norms, from disk, against hooks on the linear layers of a plain forward."""
    expected: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            sums_I = args[0].double().flatten(0, -2).square().sum(0)
            expected[name] = expected.get(name, 0.0) + sums_I

        return add

    handles = [
        module.register_forward_pre_hook(hook(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    with torch.no_grad():
        for batch in TOKENS.split(2):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    compared = 0
    for schedule in ("layer", "module"):
        SEEN.clear()
        done = prune(folder, method=f"{__name__}:Recorder", sparsity=0.0, schedule=schedule)
        for name in SEEN.keys() & expected.keys():
            # float32 sums of squares, of activations that went through another order of products
            torch.testing.assert_close(SEEN[name].double(), expected[name], rtol=1e-3, atol=1e-5)
        compared = len(SEEN.keys() & expected.keys())
        lost = expected.keys() - SEEN.keys() - done.report["left_alone"].keys()
        inside = {name for name in lost if any(name.startswith(one.prefix) for one in find_units(model, head=False))}
        if inside:
            raise AssertionError(f"{len(inside)} matrices saw inputs and are not in the report: {sorted(inside)[:3]}")
    if not SEEN:
        raise AssertionError("no matrix was found")
    return f"{len(SEEN)} matrices, {compared} compared"


def prune(source: Path | PreTrainedModel, out: Path | None = None, **settings: Any) -> llmprune.Result:
    settings = {"calibration": TOKENS, "batch_size": 2, **settings}
    if isinstance(source, Path) and out is None:
        with tempfile.TemporaryDirectory() as scratch:
            return llmprune.prune(source, out=Path(scratch) / "out", **settings)
    return llmprune.prune(source, out=out, **settings)


def weights(method: str, schedules: tuple[str, ...], **amount: Any) -> Check:
    def check(model: PreTrainedModel, folder: Path) -> str:
        for schedule in schedules:
            settings = {"method": method, "schedule": schedule, **amount}
            with tempfile.TemporaryDirectory() as scratch:
                streamed = prune(folder, Path(scratch) / "streamed", **settings)
                resident = prune(load(folder), Path(scratch) / "resident", **settings)
                rows = {row["name"]: row["achieved"] for row in streamed.report["tensors"]}
                one, other = (load(Path(scratch) / name) for name in ("streamed", "resident"))
                differ = [key for key, value in one.state_dict().items() if not same(value, other.state_dict()[key])]
                if differ:
                    raise AssertionError(f"{schedule}: {len(differ)} tensors differ from those in memory: {differ[:3]}")
                # the same weights in the same class: only the experts may run in another order
                torch.testing.assert_close(logits(one), logits(resident.model), rtol=1e-3, atol=1e-4)
        return f"{len(rows)} matrices, {sum(rows.values())} zeros"

    return check


def depth(model: PreTrainedModel, folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        done = prune(folder, Path(scratch) / "out", method="keep-first", drop_layers=1)
        smaller = load(Path(scratch) / "out")
        totals = done.report["totals"]
        if count(smaller) != totals["params_after"] or count(smaller) >= count(model):
            raise AssertionError(f"{count(smaller)} parameters, where {totals} were reported")
        return generates(smaller, model)


def experts(model: PreTrainedModel, folder: Path) -> str:
    if not any(True for unit in find_units(model, head=False) for _ in expert_blocks(unit.module)):
        return "none"
    with tempfile.TemporaryDirectory() as scratch:
        prune(folder, Path(scratch) / "out", method="expert-norm", drop_experts=0.5)
        smaller = load(Path(scratch) / "out")
        if count(smaller) >= count(model):
            raise AssertionError("no parameter went")
        return generates(smaller, model)


def width(model: PreTrainedModel, folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"ratio": 0.2}
        resident = prune(load(folder), method="wanda-sp", **settings)
        prune(folder, Path(scratch) / "out", method="wanda-sp", **settings)
        smaller = load(Path(scratch) / "out")
        if count(smaller) >= count(model):
            raise AssertionError("no parameter went")
        torch.testing.assert_close(logits(smaller), logits(resident.model), rtol=1e-3, atol=1e-4)
        return generates(smaller, model)


CHECKS: dict[str, Check] = {
    "engine": engine,
    "sparsegpt 50 %": weights("sparsegpt", ("layer", "module"), sparsity=0.5),
    "2:4": weights("sparsegpt", ("layer",), pattern="2:4"),
    "wanda 50 %": weights("wanda", ("module",), sparsity=0.5),
    "depth": depth,
    "experts": experts,
    "width": width,
}


def generates(model: PreTrainedModel, dense: PreTrainedModel) -> str:
    """Raises if greedy text with the cache is not that without, where the dense model does not fail at that as well."""
    try:
        _same_text(model)
    except (AssertionError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        try:
            _same_text(dense)
        except type(error):
            return f"but the class itself cannot generate: {_line(error)}"
        raise
    return ""


def _same_text(model: PreTrainedModel) -> None:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(TOKENS[:1, :8], use_cache=cache, **settings) for cache in (True, False))
    if not torch.equal(cached, plain):
        raise AssertionError(f"with the cache {cached[0, 8:].tolist()}, without {plain[0, 8:].tolist()}")


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS[:2], use_cache=False).logits
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(each.flatten().contiguous().view(torch.uint8) for each in (one, other)))


def count(model: PreTrainedModel) -> int:
    return sum(one.numel() for name, one in model.named_parameters() if name not in model.all_tied_weights_keys)


def visit(kind: str) -> dict[str, str]:
    """What became of a type: "ok ...", "refused: ..." or "FAILED ..." for each check."""
    try:
        model = build(kind)
        logits(model)
    except Exception as error:  # noqa: BLE001 (the classes raise what they like)
        return {"build": f"cannot be built: {_line(error)}"}
    found = {"build": f"ok {count(model)} parameters"}
    with tempfile.TemporaryDirectory(prefix="zoo_") as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        for name, check in CHECKS.items():
            try:
                found[name] = f"ok {check(model, folder)}".strip()
            except UserError as error:
                found[name] = f"refused: {_line(error).replace(str(folder), 'it')}"
                if name == "engine":  # nothing else can be done with it
                    break
            except Exception as error:  # noqa: BLE001 (whatever it is, it is a fault to be listed)
                last = traceback.extract_tb(error.__traceback__)[-1]
                found[name] = (
                    f"FAILED {type(error).__name__}: {_line(error)} ({Path(last.filename).name}:{last.lineno})"
                )
    return found


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines)[:300]


def _alone(kind: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    answer.send(visit(kind))


def visit_apart(kind: str) -> dict[str, str]:
    """In a process of its own, which may crash or hang."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(kind, there))
    process.start()
    there.close()
    try:
        found: dict[str, str] = here.recv() if here.poll(SECONDS) else {"build": f"FAILED: more than {SECONDS} s"}
    except EOFError:
        found = {"build": "FAILED: the process died"}
    process.kill()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types as transformers calls them; all if none is named")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    arguments = parser.parse_args()
    kinds = arguments.types or list(TYPES)
    unknown = [kind for kind in kinds if kind not in TYPES]
    if unknown:
        sys.exit(f"{unknown[0]!r} is no type of causal language model of transformers {transformers.__version__}")
    found: dict[str, dict[str, str]] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for kind, row in zip(kinds, pool.map(visit_apart, kinds), strict=True):
            found[kind] = row
            print(
                kind, *(f"\n    {name}: {said}" for name, said in row.items() if not said.startswith("ok")), flush=True
            )
    failed = faults(found)
    print(f"{len(found)} types, {len(failed)} with faults: {', '.join(failed)}")
    if not arguments.types:
        text = report(found, failed)
        name = f"zoo-{transformers.__version__}"
        record.save(name, {"environment": record.environment(), "types": found}, text)
    sys.exit(1 if failed else 0)


def faults(found: dict[str, dict[str, str]]) -> list[str]:
    """Types with a failed check, and decoder-only types that the engine refuses."""
    return [
        kind
        for kind, row in found.items()
        if any(said.startswith("FAILED") for said in row.values())
        or (kind not in NO_DECODERS and row.get("engine", "").startswith("refused"))
    ]


def report(found: dict[str, dict[str, str]], failed: list[str]) -> str:
    decoders = {kind: row for kind, row in found.items() if kind not in NO_DECODERS}
    built = {kind: row for kind, row in decoders.items() if row["build"].startswith("ok")}
    others = {kind: row for kind, row in found.items() if kind in NO_DECODERS}
    lines = [
        f"transformers {transformers.__version__}: {len(found)} types of causal language models. {len(decoders)} are "
        f"decoder-only, {len(built)} of them could be built; {len(failed)} have a fault of ours.",
        "",
        record.table(
            ["decoder-only type", *CHECKS],
            [[kind, *(_cell(row.get(name, "")) for name in CHECKS)] for kind, row in built.items()],
        ),
        "## What is not ok",
        "",
        *(
            f"* {kind}, {name}: {said}"
            for kind, row in decoders.items()
            for name, said in row.items()
            if not said.startswith("ok")
        ),
        "",
        "## No decoder-only language models",
        "",
        *(
            f"* {kind}: {next((said for said in row.values() if not said.startswith('ok')), 'pruned')}"
            for kind, row in others.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _cell(said: str) -> str:
    return said.partition(":")[0].partition(" ")[0] if not said.startswith("ok") else said.removeprefix("ok ") or "ok"


if __name__ == "__main__":
    main()
