"""Control adapters: their maths and the keys of their files."""
