"""Networks that are recognised by the names of their tensors, and refused until they are supported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Refusal:
    """What a tree has that fusectl cannot fuse: why, and the way out. `pattern` is found in its tensors' names."""

    what: str
    pattern: str
    why: str
    hint: str = "--arch FILE.toml describes a tree of one's own; --drop PATTERN leaves tensors out"
    details: tuple[str, ...] = ()


_REFUSALS = (
    Refusal(
        "a mixture of experts (MoE)",
        r"(^|/)(Moe|moe|MoE)\w*/|/gate/kernel|experts?/|router|shared_experts?",
        "experts of different models are not each other's counterparts, and one router over all breaks the top-k",
    ),
    Refusal(
        "multi-head latent attention (MLA)",
        r"/(wq_a|wq_b|wkv_a|wkv_b|kv_norm|q_norm)/|kv_a_proj|kv_lora",
        "its latent norm and the rotary key that all heads share have no place in a block diagonal",
    ),
    Refusal(
        "gated delta networks or state space layers",
        r"/A_log$|dt_bias|in_proj_(qkvz|ba)|/conv1d/",
        "their recurrences are not in fusectl's tables",
    ),
    Refusal("attention sinks", r"/sinks$", "they are not in fusectl's tables"),
    Refusal(
        "gemma 3n or gemma 4: AltUp, embeddings per layer, scaled layers",
        r"altup|per_layer|laurel|layer_scalar",
        "they are not in fusectl's tables",
    ),
    Refusal(
        "queries, keys and values packed along one axis (fused_qkv)",
        r"/qkv_proj/",
        "fuse sees them apart by the output projection beside them; here it is missing, or nothing is fused",
        "without --dtype, --mesh, --scan and --unscan, convert copies them as they are",
    ),
    Refusal(
        "norms with biases and learned positions (GPT-3)",
        r"decoder_norm/bias|position_embedder|/mlp/mlp_layer_norm/",
        "they are not in fusectl's tables",
    ),
    Refusal(
        "norms over all heads' queries and keys, and none before the blocks (OLMo 3)",
        r"/attention/(query|key)_norm/",
        "they are not in fusectl's tables",
    ),
    Refusal(
        "a gemma checkpoint with stacked layers",
        r"stacked_layers/",
        "stacks of unequal depth, by kind of attention",
        "gemma.gm.ckpts loads it, and save_params writes it nested",
    ),
    Refusal(
        "a vision or audio tower beside the decoder",
        r"vision_encoder|audio_encoder|SigLiP|(^|/)(mm|audio)_|VisionEmbedder|VisionEncoder",
        "only the decoder is in fusectl's tables",
        "--drop '*vision*' --drop '*/mm_*' leaves it out: what remains is the model of text",
    ),
    Refusal(
        "adapters (LoRA)", r"lora_[ab]|_LoRA", "they are not in fusectl's tables", "merge them into the weights first"
    ),
    Refusal(
        "quantized weights",
        r"/(qrhs|qtensor|scale_factor|aqt|_quantized)",
        "blocks of several scales have no place in one",
        "fuse the unquantized checkpoints",
    ),
)


def unsupported(names: Iterable[str]) -> Refusal | None:
    """All that the names of tensors give reason to refuse, in one, with the tensors that did; None for nothing."""
    everything = list(names)
    found = [
        (refusal, tensors)
        for refusal in _REFUSALS
        if (tensors := [name for name in everything if re.search(refusal.pattern, name)])
    ]
    if not found:
        return None
    details = []
    for refusal, tensors in found:
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        details.append(f"{refusal.what}: {refusal.why}; {tensors[0]}{more}")
    first, _ = found[0]
    what = " and ".join(refusal.what for refusal, _ in found)
    return replace(first, what=f"{what}, which fusectl does not fuse", details=tuple(details))
