"""How a method gets into a MODEL and out again. With nodes/, the only folder that touches ComfyUI, by public hooks only."""
