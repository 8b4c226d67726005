"""A model's config, as MaxText and the gemma package have it, for what its checkpoint does not tell.

    base_emb_dim: 4096                     MaxText's model.yml, or all of a run's config
    rope_max_timescale: 500_000
    {"num_embed": 256128, "embed_dim": …}  the fields of gemma's TransformerConfig, as YAML or JSON

Sources: maxtext/configs/base.yml and configs/models/*.yml; gemma/gm/nn/_config.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fusectl.errors import Incompatible, UsageError
from fusectl.families.kinds import Trainer
from fusectl.families.settings import Attending, Network
from fusectl.system.given import read_given


if TYPE_CHECKING:
    from fusectl.families.recognized import Recognized


# Per axis, the key that tells its size.
MAXTEXT_SIZES = {
    "embed": "base_emb_dim",
    "heads": "base_num_query_heads",
    "kv_heads": "base_num_kv_heads",
    "kv": "head_dim",
    "mlp": "base_mlp_dim",
    "vocab": "vocab_size",
    "layers": "base_num_decoder_layers",
}
GEMMA_SIZES = {
    "embed": "embed_dim",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "kv": "head_dim",
    "mlp": "hidden_dim",
    "vocab": "num_embed",
}
# MaxText's blocks that multiply queries with head_dim ** -0.5; the others' kernels are made so.
_SCALES_QUERIES = ("qwen2", "qwen3")
_CAPS_ATTENTION = ("llama2", "gemma2", "gemma3")
# MaxText's gemma2 counts pairs of layers.
_PAIRS = "gemma2"
# Of gemma's config, by its names.
GEMMA_QUERY_SCALES = {
    "BY_ONE_OVER_SQRT_HEAD_DIM": "head_dim",
    "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS": "embed_over_heads",
}
GEMMA_SWITCHES = {
    "use_post_attn_norm": "post_attention_norm",
    "use_post_ffw_norm": "post_mlp_norm",
    "use_qk_norm": "query_norm",
}
GEMMA_ATTENDING = frozenset(
    {
        "attention_types",
        "sliding_window_size",
        "local_base_frequency",
        "local_scale_factor",
        "global_base_frequency",
        "global_scale_factor",
    }
)
# MaxText goes by the name of the model.
_EMBED_OVER_HEADS = "gemma3-27b"
# Several times the whole configuration of a run of MaxText's; PyYAML takes 0.1 ms for an entry.
_LARGEST_BYTES = 1 << 18
_MOST_ENTRIES = 20_000
# Of a number, in characters: Python takes longer for each digit more.
_LONGEST_NUMBER = 64


@dataclass(frozen=True, eq=False)
class Config:
    """The values of a config file."""

    where: str
    values: Mapping[str, Any] = field(repr=False)

    @property
    def trainer(self) -> Trainer:
        """Whose config it is: maxtext or gemma."""
        return Trainer.GEMMA if self.values.keys() & {"embed_dim", "num_embed", "attention_types"} else Trainer.MAXTEXT

    def applied(self, network: Network, *, tied: bool) -> Network:
        """The network with what the config tells of it; raises UsageError for a value that cannot be.

        `tied` says whether it has a tied head: MaxText caps no others' logits.
        """
        try:
            told = dict(self._gemma(network) if self.trainer is Trainer.GEMMA else self._maxtext(network, tied=tied))
            return replace(network, **told, told=network.told | frozenset(told))
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
            said = str(error) or type(error).__name__
            raise UsageError(f"{self.where}: a value that cannot be", details=(said,)) from error

    def require_fit(self, tree: Recognized, where: str) -> None:
        """Raises Incompatible where the config is of another trainer, or of other sizes, layers or blocks than a
        checkpoint's tree, all of them listed.
        """
        sizes, depths, blocks = tree.sizes, tree.depths, tree.family.blocks
        if tree.family.trainer not in {self.trainer, ""}:
            raise Incompatible(
                f"{self.where}: a config of {self.trainer}, and {where} is {tree.family.name}",
                hint="the config that it was trained with; T5's checkpoints need none",
            )
        keys = GEMMA_SIZES if self.trainer is Trainer.GEMMA else MAXTEXT_SIZES
        if self.values.get("global_parameter_scale", 1) != 1:
            raise Incompatible(
                f"{self.where}: global_parameter_scale multiplies all sizes", hint="the sizes themselves, and scale 1"
            )
        block = self.values.get("decoder_block")
        own = counted_sizes(sizes, depths, (*blocks, str(block)))
        wrong = [
            f"{key}: {self.values[key]} in {self.where}, {own[axis]} in {where}"
            for axis, key in keys.items()
            if key in self.values and axis in own and self.values[key] != own[axis]
        ]
        if block is not None and blocks and block not in blocks:
            wrong.append(f"decoder_block: {block} in {self.where}, {' or '.join(blocks)} in {where}")
        kinds = self.values.get("attention_types")
        if isinstance(kinds, list | tuple) and len(kinds) != own["layers"]:
            wrong.append(f"attention_types: {len(kinds)} in {self.where}, {own['layers']} layers in {where}")
        roles = {role for row in tree.rows.values() for role in row.roles}
        for key, role in GEMMA_SWITCHES.items():
            if key in self.values and self.trainer is Trainer.GEMMA and bool(self.values[key]) != (role in roles):
                wrong.append(f"{key}: {self.values[key]} in {self.where}, {role in roles} in {where}")
        if wrong:
            raise Incompatible(f"{where}: not the model of {self.where}", details=wrong)

    def _maxtext(self, network: Network, *, tied: bool) -> Iterator[tuple[str, Any]]:
        values = self.values
        if "mlp_activations" in values:
            activations = values["mlp_activations"]
            if not isinstance(activations, list) or len(activations) != 2 or activations[1] != "linear":
                raise ValueError(f"mlp_activations {activations!r}: a gated MLP has one and linear")
            yield "activation", str(activations[0])
        if "normalization_layer_epsilon" in values:
            # Gemma's blocks have their own.
            gemma = str(values.get("decoder_block", "")).startswith("gemma")
            yield "final_norm_epsilon" if gemma else "norm_epsilon", float(values["normalization_layer_epsilon"])
        if values.get("decoder_block") in _SCALES_QUERIES:
            yield "query_scale", "head_dim"
        if str(values.get("model_name", "")).startswith("gemma3"):
            yield "query_scale", "embed_over_heads" if values["model_name"] == _EMBED_OVER_HEADS else "head_dim"
        if "normalize_embedding_logits" in values:
            divides = values["normalize_embedding_logits"]
            if not isinstance(divides, bool):
                raise TypeError(f"normalize_embedding_logits {divides!r}: true or false")
            yield "tied_logits_power", -0.5 if divides else 0.0
        if "attn_logits_soft_cap" in values and values.get("decoder_block", "llama2") in _CAPS_ATTENTION:
            yield "attention_soft_cap", _cap(values["attn_logits_soft_cap"])
        if "final_logits_soft_cap" in values and tied:
            yield "logits_soft_cap", _cap(values["final_logits_soft_cap"])
        if "rope_type" in values:
            yield "rope_type", str(values["rope_type"])
        if values.keys() & {
            "rope_max_timescale",
            "local_rope_max_timescale",
            "rope_linear_scaling_factor",
            "sliding_window_size",
        }:
            yield "attending", tuple(self._attending(each) for each in network.attending)

    def _attending(self, own: Attending) -> Attending:
        values = self.values
        base = float(values.get("rope_max_timescale", own.rope_base))
        if own.window is None:
            return Attending(base, float(values.get("rope_linear_scaling_factor", own.rope_scale)))
        local = float(values.get("local_rope_max_timescale", -1))
        return Attending(
            local if local > 0 else base, own.rope_scale, int(values.get("sliding_window_size", own.window))
        )

    def _gemma(self, network: Network) -> Iterator[tuple[str, Any]]:
        values = self.values
        if "attn_logits_soft_cap" in values:
            yield "attention_soft_cap", _cap(values["attn_logits_soft_cap"])
        if "final_logit_softcap" in values:
            yield "logits_soft_cap", _cap(values["final_logit_softcap"])
        if "query_pre_attn_norm" in values:
            name = str(values["query_pre_attn_norm"]).rsplit(".", 1)[-1]
            if name not in GEMMA_QUERY_SCALES:
                raise ValueError(f"query_pre_attn_norm {name}: {' or '.join(GEMMA_QUERY_SCALES)}")
            yield "query_scale", GEMMA_QUERY_SCALES[name]
        if values.keys() & GEMMA_ATTENDING:
            own = network.attending
            local = next((each for each in own if each.window is not None), Attending(window=None))
            wide = next((each for each in own if each.window is None), Attending())
            window = values.get("sliding_window_size", local.window)
            kinds = [str(each).rsplit(".", 1)[-1].lower() for each in values.get("attention_types", ())]
            if not set(kinds) <= {"local_sliding", "global"}:
                raise ValueError(f"attention types {', '.join(dict.fromkeys(kinds))}")
            if "local_sliding" in kinds and not window:
                raise ValueError("attention types LOCAL_SLIDING without a sliding_window_size")
            local = Attending(
                float(values.get("local_base_frequency", local.rope_base)),
                float(values.get("local_scale_factor", local.rope_scale)),
                None if window is None else int(window),
            )
            wide = Attending(
                float(values.get("global_base_frequency", wide.rope_base)),
                float(values.get("global_scale_factor", wide.rope_scale)),
            )
            slides = [kind == "local_sliding" for kind in kinds] or [each.window is not None for each in own]
            yield "attending", tuple(local if each else wide for each in slides)


def counted_sizes(sizes: Mapping[str, int], depths: Mapping[str, int], blocks: Collection[str]) -> dict[str, int]:
    """The sizes of a tree as configs count them: kv heads also where they are as many as heads, and all the layers.

    `blocks` are the names that a config may have for the block: by one of them MaxText counts pairs of layers.
    """
    layers = sum(depths.values()) // (2 if _PAIRS in blocks else 1)
    return {**sizes, "kv_heads": sizes.get("kv_heads", sizes.get("heads", 0)), "layers": layers}


def read_config(path: str) -> Config:
    """The Config in a file; raises NotFound, or UsageError for what is none."""
    raw = read_given(path, _LARGEST_BYTES, "a model's config")
    try:
        values = _parsed(raw)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # What PyYAML makes of values that are not what their tags say, and of trees that have no end.
        details = tuple(str(error).splitlines()[:3]) or (type(error).__name__,)
        raise UsageError(f"{path}: cannot be read as YAML or JSON", details=details) from error
    known = {*MAXTEXT_SIZES.values(), *GEMMA_SIZES.values(), "decoder_block", "rope_max_timescale", "attention_types"}
    if not isinstance(values, Mapping) or not values.keys() & known:
        raise UsageError(
            f"{path}: no config of a model", hint="MaxText's configs/models/NAME.yml, or gemma's TransformerConfig"
        )
    return Config(path, {str(key): _number(value) for key, value in values.items()})


def _parsed(raw: bytes) -> Any:
    """The tree that YAML, or JSON, is; raises ValueError for what is none, or would grow beyond what is written."""
    import yaml

    entries = sum(map(raw.count, (b",", b"\n", b"[", b"{", b":")))
    if entries > _MOST_ENTRIES:
        raise ValueError(f"{entries:,} entries, more than {_MOST_ENTRIES:,}")

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """One that refuses references, which ten lines of can stand for a billion values, and endless numbers."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"line {self.peek_event().start_mark.line + 1}: a reference (*); write it out")
            return super().compose_node(parent, index)

        def construct_scalar(self, node: Any) -> Any:
            if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
                raise ValueError(f"line {node.start_mark.line + 1}: a number of {len(node.value):,} characters")
            return super().construct_scalar(node)

    try:
        return yaml.load(raw.decode(), Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


_NUMBERS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})


def _number(value: Any) -> Any:
    """YAML takes 1e-6 for text."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def _cap(value: Any) -> float | None:
    """A soft cap; MaxText's 0 is none."""
    return float(value) if value else None
