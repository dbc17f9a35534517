from comfy_api.latest import io

from ...methods.sampling.feature_bank import DTYPES, WHAT
from ...methods.sampling.flow import SOLVERS
from ...patching.feature_sharing import LAST_THIRD, BankSocket
from ...patching.rf_invert import Asked, invert


class RfInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraRfInvert",
            display_name="RF Invert",
            category="Tessera/sampling",
            description="Finds the noise that a picture or clip comes from, by following the flow backwards. Sampled with the same sigmas and RF-Solver "
            "Sampler, that noise gives the source back; with another prompt, an edit of it.",
            search_aliases=["RF Inversion", "RF-Solver", "RF-Edit", "Unsampler", "flux inversion", "FlowMatch inversion", "FireFlow",
                            "rectified flow inversion", "latent to noise", "Fluxtapoz"],
            inputs=[
                io.Model.Input("model", tooltip="A flow model (FLUX, SD3, Wan, Qwen-Image, HunyuanVideo, LTX). To record features, before any cache node."),
                io.Conditioning.Input("positive", tooltip="What the source shows. An empty prompt also works."),
                io.Latent.Input("latent", tooltip="The source, for example from VAE Encode. Its noise mask is not used here."),
                io.Sigmas.Input("sigmas", tooltip="The schedule of the edit to come, from noise to 0. A denoise below 1 keeps more of the source."),
                io.Combo.Input("solver", options=list(SOLVERS),
                    tooltip="The same as in RF-Solver Sampler. rf_solver comes back to the source with order 3 at 2 evaluations a step, fireflow takes "
                            "1 a step, euler 1 and drifts, ralston_3 3."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance while inverting. 1, the paper's, is the most stable; higher needs a negative prompt and drifts."),
                io.Float.Input("start_sigma", default=0.001, min=0.0001, max=0.1, step=0.0001, round=0.00001, advanced=True,
                    tooltip="Lowest noise level that the model is asked at, 0 to 1: at 0 it tells no direction. Lower is closer to the flow and loses "
                            "digits to rounding."),
                io.Boolean.Input("first_step_euler", default=False, advanced=True,
                    tooltip="On where RF-Solver Sampler has last_step_euler on, so that the two directions match."),
                io.Int.Input("record_steps", default=4, min=0, max=1000,
                    tooltip="Steps nearest to the noise whose features are kept in system memory for RF Edit; at least its inject_steps. FLUX at 1024 "
                            "x 1024: about 1 GiB each with rf_solver. 0 keeps nothing."),
                io.Combo.Input("record", options=list(WHAT), advanced=True,
                    tooltip="Which features of self-attention: values (the paper's), keys, both, or its output. Values keep the look, keys the layout."),
                io.String.Input("record_blocks", default=LAST_THIRD, advanced=True,
                    tooltip='Transformer blocks to record, counted from 0 over the whole stack, like "39-56": "last third" is the paper\'s choice for '
                            'FLUX and HunyuanVideo, "all" holds the source most firmly and takes three times the memory.'),
                io.Combo.Input("record_dtype", options=list(DTYPES), advanced=True,
                    tooltip="Precision of the kept features. float8 halves the memory of a bfloat16 model at 2 to 3 % error."),
                io.Conditioning.Input("negative", optional=True, tooltip="Negative prompt, for cfg other than 1."),
            ],
            outputs=[
                io.Noise.Output(tooltip="Starts SamplerCustomAdvanced at the inverted state; with the same sigmas it leads back to the source."),
                BankSocket.Output(display_name="bank", tooltip="The recorded features, for RF Edit."),
                io.Latent.Output(tooltip="The inverted state itself, to look at."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, latent, sigmas, solver, cfg, start_sigma, first_step_euler, record_steps, record, record_blocks,
                record_dtype, negative=None):  # fmt: skip
        asked = Asked(solver, cfg, start_sigma, first_step_euler, record_steps, record, record_blocks, record_dtype)
        noise, bank, samples = invert(model, positive, negative, latent, sigmas, asked)
        out = {key: value for key, value in latent.items() if key != "noise_mask"}
        return io.NodeOutput(noise, bank, {**out, "samples": samples})
