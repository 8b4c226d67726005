"""A run of T5X on one batch of tokens over and over, in T5X's own environment: see test_t5x.py.

python t5x_run.py TOKENS.npz SEEN.npz --run_mode=train --gin_file=small.gin ...

What follows the two files is T5X's own command line. SEEN.npz gets the training state as it is before the first step,
by its names in a checkpoint, the logits of that state on the tokens, and the loss of every step.
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


def stand_in_for_what_is_not_installed():
    """Kinds of datasets that T5X asks for by isinstance, and an optimizer: neither is on PyPI as T5X wants it."""
    stand_in("airio")
    kinds = ("Task", "Mixture", "DatasetProviderBase", "AirIODatasetIterator")
    stand_in("airio.core", **{kind: type(kind, (), {}) for kind in kinds})
    stand_in("jestimator")
    stand_in("jestimator.amos", amos=None, ScaleByAmosState=type("ScaleByAmosState", (), {}))
    stand_in("jestimator.amos_helper", state_partition_rule=None)


def register(tokens):
    """Registers the task `tokens`, whose rows come over and over."""
    import seqio
    import tensorflow as tf

    def source(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices({"inputs": tokens["enc"], "targets": tokens["tgt"]}).repeat()

    feature = seqio.Feature(seqio.PassThroughVocabulary(int(tokens["vocab"])), add_eos=False)
    seqio.TaskRegistry.add(
        "tokens",
        source=seqio.FunctionDataSource(source, splits=("train", "validation")),
        preprocessors=[],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[],
    )


def recording(train, tokens, seen):
    """Trainer.train, which also notes in `seen` what it begins with, and what comes out."""
    import jax
    import numpy as np

    names = {"enc": "encoder_input_tokens", "dec": "decoder_input_tokens", "tgt": "decoder_target_tokens"}
    batch = {long: tokens[short] for short, long in names.items()}

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


def main(tokens, to, *flags):
    """Runs T5X with these flags."""
    stand_in_for_what_is_not_installed()
    import jax
    import numpy as np
    from t5x import trainer

    tokens, seen = dict(np.load(tokens)), {}
    register(tokens)
    trainer.Trainer.train = recording(trainer.Trainer.train, tokens, seen)
    sys.argv = ["t5x.main", *flags]
    try:
        with jax.default_matmul_precision("highest"):
            runpy.run_module("t5x.main", run_name="__main__", alter_sys=True)
    finally:
        np.savez(to, **seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
