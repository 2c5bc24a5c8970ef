# SPDX-License-Identifier: MIT
"""What the tests of the pages in docs/compatibility share: a page's rows, and a probe for each, which
returns what it computed, all of it finite, where our column says yes, and raises where it says no."""

import re
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "compatibility"


class Page:
    def __init__(self, name, make):
        """docs/compatibility/<name>.md; probes are given make(device)."""
        self.text = (FOLDER / f"{name}.md").read_text()
        self.make = make
        self.probes = {}

    def rows(self):
        """{feature: (official, mate, ours on a CPU, ours on CUDA)}"""
        lines = [line.strip("|\n ").split(" | ") for line in self.text.splitlines() if line[:1] == "|"]
        assert lines[0][0] == "feature" and all(len(line) == 5 for line in lines[2:]), lines
        return {feature: cells for feature, *cells in lines[2:]}

    def probe(self, feature):
        def keep(function):
            self.probes[feature] = function
            return function

        return keep

    def check(self, feature, device):
        """Our column's word about the feature."""
        if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the column is about Hopper")
        word = re.match(r"yes|no", self.rows()[feature][2 if device == "cpu" else 3])
        assert word, "our columns begin with yes or no"
        probe = self.probes[feature]
        if word[0] == "yes":
            assert probe(self.make(device)).float().isfinite().all()
        else:
            with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
                probe(self.make(device))
