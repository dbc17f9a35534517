"""The score of clips that are carried on beyond the trained length."""

import torch
from digits_data import clips, real_digits
from digits_score import FILES, load_model, wanted
from long_video_score import by_blocks, draw, readable, told
from pack import ROOT


def test_real_clips_are_readable_in_every_block_and_others_are_not(reader):
    images, labels = real_digits()
    digits, directions = wanted("video", 8)
    picked = torch.stack([images[(labels == digit).nonzero()[0, 0]] for digit in digits])
    real = clips(picked, directions, torch.Generator().manual_seed(0))
    assert readable(real, 4, reader).shape == (8, 2) and readable(real, 4, reader).float().mean() > 0.9
    assert not readable(real.flip(1), 4, reader).any()  # backwards it moves the other way
    assert not readable(real.roll(1, 0), 4, reader).any()


def test_the_interval_is_of_clips_and_not_of_blocks():
    found = torch.tensor([[True, True], [True, True], [False, False], [True, True]])
    assert told(found) == "75.0 % of blocks readable, 95 % interval 26.0 to 100.0; by block 75 75"


def test_a_clip_twice_as_long_as_trained_stays_readable(reader, host):
    model, sampler = by_blocks(load_model(ROOT / "models" / FILES["video"]), 4)
    found = readable(draw(model, sampler, 2, 16, 10, 3.0, 2), 4, reader)
    assert found.shape == (2, 4) and found.float().mean() >= 0.8
