"""A run of T5X on a batch of tokens that is always the same, in T5X's own environment: see test_t5x.py.

python t5x_run.py TOKENS.npz SEEN.npz --run_mode=train --gin_file=small.gin ...

What follows the two files is T5X's own command line. SEEN.npz gets the training state as it is before the first step, by
its names in a checkpoint, the logits of that state on the tokens, and the loss of every step.
"""

import functools
import os
import runpy
import sys
import types


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def stand_in(name, **members):
    """Puts a module in the place of one that T5X imports and this run does not need."""
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
    package, _, last = name.rpartition(".")
    if package:
        setattr(sys.modules[package], last, module)


# Neither is on PyPI as T5X wants it: kinds of datasets that are asked for by isinstance, and an optimizer.
stand_in("airio")
stand_in(
    "airio.core",
    **{name: type(name, (), {}) for name in ("Task", "Mixture", "DatasetProviderBase", "AirIODatasetIterator")},
)
stand_in("jestimator")
stand_in("jestimator.amos", amos=None, ScaleByAmosState=type("ScaleByAmosState", (), {}))
stand_in("jestimator.amos_helper", state_partition_rule=None)

import jax
import numpy as np
import seqio
import tensorflow as tf
from t5x import trainer


def register(tokens):
    """The task `tokens`: rows of a .npz, over and over."""
    vocabulary = seqio.PassThroughVocabulary(int(tokens["vocab"]))
    rows = {"inputs": tokens["enc"], "targets": tokens["tgt"]}

    def source(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices(rows).repeat()

    feature = seqio.Feature(vocabulary, add_eos=False)
    seqio.TaskRegistry.add(
        "tokens",
        source=seqio.FunctionDataSource(source, splits=("train", "validation")),
        preprocessors=[],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[],
    )


def recording(train, tokens, seen):
    """Trainer.train, which also notes what it begins with, and what comes out."""
    batch = {
        "encoder_input_tokens": tokens["enc"],
        "decoder_input_tokens": tokens["dec"],
        "decoder_target_tokens": tokens["tgt"],
    }

    @functools.wraps(train)
    def wrapper(self, batches, steps, start_step=None):
        if not seen:
            state = self.train_state
            leaves = jax.tree_util.tree_flatten_with_path(state.state_dict())[0]
            seen.update({"/".join(key.key for key in path): np.asarray(value) for path, value in leaves})
            seen["logits"] = np.asarray(self._model._compute_logits(state.params, batch))
            seen["losses"] = np.zeros(0)
        summary = train(self, batches, steps, start_step)
        loss = summary.result()["cross_ent_loss_per_all_target_tokens"].value
        seen["losses"] = np.append(seen["losses"], float(loss))
        return summary

    return wrapper


def main(tokens, seen, *flags):
    """Runs T5X with these flags."""
    tokens, found = dict(np.load(tokens)), {}
    register(tokens)
    trainer.Trainer.train = recording(trainer.Trainer.train, tokens, found)
    sys.argv = ["t5x.main", *flags]
    try:
        with jax.default_matmul_precision("highest"):
            runpy.run_module("t5x.main", run_name="__main__", alter_sys=True)
    finally:
        np.savez(seen, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
