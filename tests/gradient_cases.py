"""The loss that a train step differentiates, and how its gradients are compared."""

import jax
import numpy as np

from emu3_jax.training.losses import chunked_cross_entropy, next_tokens


def mean_loss(params, tokens, target, model):
    """What a train step differentiates."""
    labels, mask = next_tokens(tokens, target)
    states = model.apply({"params": params}, tokens, method="hidden", rngs={"dropout": jax.random.key(0)})
    special = model.config.tokens
    visual = (special.visual_start, special.visual_end)
    total, sums = chunked_cross_entropy(states, params["head"]["kernel"], labels, mask, visual, chunk=16)
    return total / sums.count


def assert_close(found, wanted, relative):
    """Each leaf within `relative` of the largest entry of the wanted one."""

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        worst = np.abs(a - b).max() / np.abs(b).max()
        assert worst <= relative, f"{jax.tree_util.keystr(path)}: {worst}"

    jax.tree_util.tree_map_with_path(check, found, wanted)
