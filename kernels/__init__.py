"""One operation a file: the maths, a torch reference, a Triton kernel, a custom op, example(). They know torch and triton."""
