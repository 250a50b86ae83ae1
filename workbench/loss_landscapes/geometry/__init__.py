"""Instruments that look at the loss as a function of a network's parameters.

`Objective(model, loss_fn, data)` turns any `nn.Module` into a function of one flat vector, which
all other instruments take: directions and slices, curvature, sharpness, paths between two
networks, matching of hidden units, similarity of features. All load on first use.
"""

from __future__ import annotations

from workbench.lab import lazy

NAMES = {
    "Density": "density",
    "Eigs": "curvature",
    "Estimate": "estimates",
    "Objective": "objective",
    "Operator": "operators",
    "Path": "paths",
    "Plane": "directions",
    "SAM": "sam",
    "Slice1D": "slices",
    "Slice2D": "slices",
    "Spectrum": "curvature",
    "Trace": "traces",
    "activation_permutations": "matching",
    "barrier": "paths",
    "bezier": "paths",
    "chain_spec": "units",
    "filter_normalized_direction": "directions",
    "linear_cka": "similarity",
    "linear_path": "paths",
    "match_units": "matching",
    "mode_connectivity": "paths",
    "permute": "matching",
    "random_direction": "directions",
    "random_plane": "directions",
    "sharpness_average": "sharpness",
    "sharpness_sam": "sharpness",
    "sharpness_worst": "sharpness",
    "signed_connectivity": "paths",
    "slice_1d": "slices",
    "slice_2d": "slices",
    "spectral_density": "curvature",
    "spectrum": "curvature",
    "top_eigs": "curvature",
    "trace": "traces",
    "trace_hutchpp": "traces",
    "trajectory_directions": "directions",
    "weight_permutations": "matching",
    "worst_direction": "sharpness",
}

__getattr__, __dir__ = lazy.names(__name__, __file__, NAMES)
