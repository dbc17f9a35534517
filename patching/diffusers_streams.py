"""What the blocks of diffusers' transformers are given and return, in the words of archs/diffusers.py."""

OURS = {"hidden_states": "img", "encoder_hidden_states": "txt", "temb": "vec"}  # as hooks of core's models know them
THEIRS = {ours: theirs for theirs, ours in OURS.items()}
IMAGE, IMAGE_TEXT, TEXT_IMAGE = ("img",), ("img", "txt"), ("txt", "img")
RETURNS = {  # class of a block -> the streams that it returns, in order
    "BasicTransformerBlock": IMAGE,
    "SanaTransformerBlock": IMAGE,
    "SanaVideoTransformerBlock": IMAGE,
    "LTXVideoTransformerBlock": IMAGE,
    "WanTransformerBlock": IMAGE,
    "CogVideoXBlock": IMAGE_TEXT,
    "FluxTransformerBlock": TEXT_IMAGE,
    "FluxSingleTransformerBlock": TEXT_IMAGE,
    "JointTransformerBlock": TEXT_IMAGE,
}
