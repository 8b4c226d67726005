"""Logits of the gemma package for checkpoints, run in the package's own environment: see test_gemma.py.

python gemma_logits.py TOKENS.npy CHECKPOINT CONFIG.json LOGITS.npy [CHECKPOINT CONFIG.json LOGITS.npy ...]
"""

import json
import os
import sys


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import kauldron.checkpoints


# gemma 3.3 knows it by the name that it had before kauldron 1.4.
if not hasattr(kauldron.checkpoints, "AbstractPartialLoader"):
    kauldron.checkpoints.AbstractPartialLoader = kauldron.checkpoints.InitTransform

import jax
import jax.numpy as jnp
import numpy as np
from gemma import gm
from gemma.gm.nn import _config, _modules


def config_of(path):
    """The package's config from the fields of a JSON file."""
    with open(path) as file:  # noqa: PTH123
        fields = json.load(file)
    fields["attention_types"] = tuple(_modules.AttentionType[name] for name in fields["attention_types"])
    fields["query_pre_attn_norm"] = _config.QueryPreAttentionNormalisation[fields["query_pre_attn_norm"]]
    return _config.TransformerConfig(**fields)


def main(tokens, *cases):
    """Writes the logits of each checkpoint."""
    tokens = jnp.asarray(np.load(tokens))
    with jax.default_matmul_precision("highest"):
        for checkpoint, config, logits in zip(cases[::3], cases[1::3], cases[2::3], strict=True):
            model = gm.nn.Transformer(config=config_of(config), dtype=jnp.float32)
            params = gm.ckpts.load_params(checkpoint)
            np.save(logits, np.asarray(model.apply({"params": params}, tokens=tokens).logits))


if __name__ == "__main__":
    main(*sys.argv[1:])
