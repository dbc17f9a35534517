"""Class Label: what it hands on. What a DiT makes of it is in test_load_diffusers_model.py."""

import pytest
import torch
from nodes_helper import run_node

from tessera.nodes.loaders.class_label import ClassLabel


@pytest.mark.parametrize("label", [-1, 0, 207, 999])
def test_the_class_is_in_the_conditioning(label):
    ((placeholder, extra),) = run_node(ClassLabel, class_label=label)[0]
    assert extra == {"class_label": label}
    assert torch.equal(placeholder, torch.zeros(1, 1, 1))


def test_two_labels_do_not_share_what_they_hold():
    one, other = (run_node(ClassLabel, class_label=n)[0] for n in (1, 2))
    one[0][1]["class_label"] = 5
    assert other[0][1]["class_label"] == 2
