"""Trees of features as nested nodes, the form in which SAELens writes them."""

from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.files.json import check_keys, field, list_field, read_json
from toyfeat.worlds.hierarchy import Hierarchy, hierarchy

_WHO = "load_synthetic_model"
_NODE = (
    *("feature_index", "feature_id", "children"),
    *("mutually_exclusive_children", "scale_children_by_parent"),
)


def nest_trees(trees: Hierarchy) -> list[dict[str, Any]]:
    """Nest trees as SAELens does; siblings of several kinds get empty nodes."""
    parents, groups, scaled = (np.asarray(x) for x in trees[:3])
    # Children of every feature, by the group and the scaling that they share.
    below: dict[int, dict[tuple[int, bool], list[int]]] = {}
    for feature, parent in enumerate(parents):
        if parent >= 0 or groups[feature] >= 0:
            kind = int(groups[feature]), bool(scaled[feature])
            below.setdefault(int(parent), {}).setdefault(kind, []).append(feature)

    def node(feature: int | None, kinds: dict[tuple[int, bool], list[int]]) -> dict:
        # One kind of children hangs below the feature; several get a node each.
        flags, children = (-1, False), []
        if len(kinds) == 1:
            ((flags, members),) = kinds.items()
            children = [node(m, below.get(m, {})) for m in members]
        else:
            children = [node(None, {k: v}) for k, v in kinds.items()]
        return {
            "feature_index": feature,
            "mutually_exclusive_children": flags[0] >= 0 and len(children) > 1,
            "scale_children_by_parent": flags[1],
            "feature_id": None,
            "children": children,
        }

    # Roots are features with children of their own, then groups without a parent.
    tops = [f for f in below if f >= 0 and parents[f] < 0 and groups[f] < 0]
    roots = [node(top, below[top]) for top in sorted(tops)]
    return roots + [node(None, {k: v}) for k, v in below.get(-1, {}).items()]


def parse_trees(source: Path, num: int) -> Hierarchy:
    """Build a hierarchy from nested nodes, which are visited depth first."""
    parents, groups = np.full(num, -1), np.full(num, -1)
    scaled, seen, count = np.zeros(num, bool), set(), 0
    roots = list_field(read_json(source, _WHO), "roots", dict, source, _WHO)
    # Nodes with the parent of their features, and whether it scales their codes.
    waiting = [(root, -1, False) for root in roots]
    while waiting:
        node, parent, scales = waiting.pop()
        check_keys(node, _NODE, source, _WHO, ignore_off=True)
        feature = _feature_index(node, source, num)
        # A node without a feature hands its parent on to its children.
        if feature is not None:
            if feature in seen:
                raise ValueError(
                    f"{_WHO}: feature_index {feature} appears twice in {source}; save "
                    "the world again"
                )
            seen.add(feature)
            parents[feature], scaled[feature] = parent, scales and parent >= 0
            parent = feature
        children = []
        if "children" in node:
            children = list_field(node, "children", dict, source, _WHO)
        # Children that exclude each other get the number of their group.
        name = "mutually_exclusive_children"
        if field(node, name, bool, source, _WHO, default=False):
            inside = [_feature_index(child, source, num) for child in children]
            groups[[f for f in inside if f is not None]] = count
            count += 1
        name = "scale_children_by_parent"
        scales = field(node, name, bool, source, _WHO, default=False)
        waiting += [(child, parent, scales) for child in children]
    return hierarchy(parents, groups, scaled)


def _feature_index(node: dict[str, Any], source: Path, num: int) -> int | None:
    """Look up the feature of a node, which may have none."""
    name, high = "feature_index", num - 1
    return field(node, name, int, source, _WHO, default=None, low=0, high=high)
