"""Networks that are recognised by the names of their tensors, and refused until they are supported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


_UNKNOWN = "a block that fusectl does not know yet"
_COPY = "without --dtype, --mesh, --scan and --unscan, convert copies it as it is"


@dataclass(frozen=True)
class Refusal:
    """What a tree has that fusectl cannot fuse: why, and the way out. `pattern` is found in its tensors' names.

    `unless` is found in those of a tree for which it is no reason.
    """

    what: str
    pattern: str
    why: str = _UNKNOWN
    hint: str = _COPY
    unless: str | None = None
    details: tuple[str, ...] = ()

    def tensors(self, names: Sequence[str]) -> list[str]:
        """The names that give the reason."""
        if self.unless is not None and any(re.search(self.unless, name) for name in names):
            return []
        return [name for name in names if re.search(self.pattern, name)]


_GPT3 = r"decoder_norm/bias|position_embedder|/mlp/mlp_layer_norm/"
_REFUSALS = (
    Refusal(
        "an optimizer's state without its model",
        r"^opt_state/",
        "Tunix saves them as two items of a step",
        "name the step, or its item model_params",
        unless=r"^(?!opt_state/|step(/|$))",
    ),
    Refusal("a mixture of experts (MoE)", r"(^|/)(Moe|moe|MoE)\w*/|/gate/kernel|experts?/|router|shared_experts?"),
    Refusal("multi-head latent attention (MLA)", r"/(wq_a|wq_b|wkv_a|wkv_b|kv_norm|q_norm)/|kv_a_proj|kv_lora"),
    Refusal("attention to compressed or chosen tokens (DeepSeek 3.2 and 4)", r"_compressor/|/indexer/"),
    Refusal("hyper-connections between layers (DeepSeek 4)", r"/mhc_\w+/|(^|/)hc_head/"),
    Refusal("gated delta networks or state space layers", r"/A_log$|dt_bias|in_proj_(qkvz|ba)|/conv1d/"),
    Refusal("attention sinks", r"/sinks$"),
    Refusal("AltUp and Laurel (Gemma 3n)", r"altup|laurel"),
    Refusal("embeddings per layer (Gemma 3n and 4)", r"per_layer"),
    Refusal("layers with a scale each (Gemma 4)", r"layer_scalar"),
    Refusal("norms with biases and learned positions (GPT-3)", _GPT3),
    Refusal(
        "queries, keys and values packed along one axis (fused_qkv)",
        r"/qkv_proj/",
        "they are taken apart where they are fused, beside an output projection of as many axes",
        unless=_GPT3,
    ),
    Refusal(
        "norms over all heads' queries and keys, and none before the blocks (OLMo 3)",
        r"(?<!/attention)/attention/(query|key)_norm/",
    ),
    Refusal(
        "a gemma checkpoint with stacked layers",
        r"stacked_layers/",
        "stacks of unequal depth, by kind of attention",
        "gemma.gm.ckpts loads it, and save_params writes it nested",
    ),
    Refusal(
        "heads that predict several tokens ahead (MTP)",
        r"(^|/)mtp_\w+/",
        "only the decoder is in fusectl's tables",
        "--drop '*mtp*' leaves them out: what remains predicts the next token as before",
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
    found = [(refusal, tensors) for refusal in _REFUSALS if (tensors := refusal.tensors(everything))]
    if not found:
        return None
    details = []
    for refusal, tensors in found:
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        details.append(f"{refusal.what}: {refusal.why}; {tensors[0]}{more}")
    hints = dict.fromkeys(refusal.hint for refusal, _ in found)
    *others, last = (refusal.what for refusal, _ in found)
    what = f"{', '.join(others)} and {last}" if others else last
    # Where one of them has no way out, those of the others lead nowhere.
    hint = _COPY if _COPY in hints else "; ".join(hints)
    return Refusal(f"{what}, which fusectl does not fuse", "", hint=hint, details=tuple(details))
