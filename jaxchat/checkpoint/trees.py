"""Trees of arrays as plain nested dicts by the leaves' paths, which do not depend on the classes they were made of."""

from __future__ import annotations

from typing import Any

import jax


def _named_leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in leaves]


def kinds(tree: Any) -> dict[str, str]:
    """Type and shape of each leaf, as `float32[64,256]`, by its path."""
    return {"/".join(names): f"{x.dtype}{list(x.shape)}".replace(" ", "") for names, x in _named_leaves(tree)}


def nested(tree: Any) -> dict[str, Any]:
    """The tree as nested dicts."""
    root: dict[str, Any] = {}
    for names, leaf in _named_leaves(tree):
        node = root
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = leaf
    return root


def like(structure: Any, root: dict[str, Any]) -> Any:
    """The inverse of `nested`, into the structure of a given tree."""
    leaves = []
    for names, _ in _named_leaves(structure):
        node = root
        for name in names:
            node = node[name]
        leaves.append(node)
    return jax.tree.unflatten(jax.tree.structure(structure), leaves)
