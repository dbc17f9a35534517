from comfy_api.latest import io

from ...patching.block_widgets import prompt_inputs, prompts_of, state_inputs
from ...patching.linear_blocks import NAME, BlockLinearSampler, LinearBlocks, levels_of
from ...patching.linear_memory import STATE_DTYPES
from ...patching.run import attach
from ...patching.video_state import VideoState, VideoStateSocket


class BlockLinearVideoSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraBlockLinearVideoSampler",
            display_name=NAME,
            category="Tessera/video",
            description="Makes a SANA-Video clip of any length chunk by chunk. What is kept of finished chunks, sums of keys and values and one frame, has the "
            "same size after a second and after minutes.",
            search_aliases=["LongSANA", "SANA-Video", "LongLive", "block linear attention", "constant memory", "long video", "infinite video", "KV state",
                            "autoregressive video", "streaming", "continue video"],
            inputs=[
                io.Model.Input("model", tooltip="From Load SANA-Video; LoRA and cache nodes may come between."),
                io.Int.Input("frames_per_block", default=10, min=1, max=64,
                    tooltip="Latent frames that are made at once, as the model was trained; the first chunk takes what is left over. More see each other, and "
                            "cost more memory."),
                io.String.Input("denoise_steps", default="1000,750,500,250",
                    tooltip="Time steps of each chunk, falling from 1000 (noise), with commas. At each the model goes to the clean frames, which are noised "
                            "anew for the next. More steps take longer; distilled models have these four."),
                io.Float.Input("timestep_shift", default=3.0, min=0.1, max=20.0, step=0.1, round=0.001,
                    tooltip="Shift of the time steps: sigma = shift t / (1 + (shift - 1) t), t from 0 to 1. Higher keeps more of the steps noisy; 1 leaves "
                            "them as they are."),
                io.Int.Input("num_cached_blocks", default=-1, min=-1, max=256,
                    tooltip="Finished chunks that a chunk looks back on. -1 or 0: all of them, in the memory of one. A window forgets what lies before it, and "
                            "holds one state for each of its chunks."),
                io.Float.Input("context_noise", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
                    tooltip="Noise level of a finished chunk when its state is taken, 0 to 1. 0 is as the model was trained; a little forgives small flaws."),
                io.Combo.Input("state_dtype", options=list(STATE_DTYPES), default="fp32", advanced=True,
                    tooltip="What the sums are kept in. bf16 takes half the memory and loses what each chunk adds to long sums; fp32 is exact."),
                *state_inputs(),
                *prompt_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="For the guider. Further nodes may come between."),
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced, with a latent of the whole length. It has the noise levels of denoise_steps, "
                                                                  "whatever sigmas the graph gives."),
                io.Sigmas.Output(display_name="sigmas", tooltip="These noise levels, for SamplerCustomAdvanced: other nodes then count the same steps."),
                VideoStateSocket.Output(display_name="state", tooltip="Filled by the run where keep_state is on, for Save Video State."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, model, frames_per_block, denoise_steps, timestep_shift, num_cached_blocks, context_noise, state_dtype,
                state=None, keep_state=False, prompt_blocks="", prompt_2=None, prompt_3=None, prompt_4=None, prompt_5=None):  # fmt: skip
        node, window = cls.hidden.unique_id, max(0, num_cached_blocks)
        feature = LinearBlocks(node, per_block=frames_per_block, window=window, state_dtype=state_dtype)
        sigmas, kept = levels_of(denoise_steps, timestep_shift), VideoState()
        sampler = BlockLinearSampler(
            NAME,
            frames_per_block,
            feature.memory,
            context_noise=context_noise,
            prompts=prompts_of(prompt_blocks, [prompt_2, prompt_3, prompt_4, prompt_5]),
            resume=None if state is None else state.taken(NAME),
            keep=kept if keep_state else None,
            node=node,
            levels=tuple(map(float, sigmas)),
        )
        return io.NodeOutput(attach(model, feature), sampler, sigmas, kept)
