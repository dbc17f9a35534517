from comfy_api.latest import io

from ...patching.block_features import MEMORIES, NAME, feature_of
from ...patching.block_sampler import BlockSampler
from ...patching.block_widgets import prompt_inputs, prompts_of, state_inputs
from ...patching.key_memory import STORED
from ...patching.run import attach
from ...patching.video_state import VideoState, VideoStateSocket


class BlockVideoSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraBlockVideoSampler",
            display_name=NAME,
            category="Tessera/video",
            description="Makes a long video a few frames at a time, each block going on from the finished ones: from their keys and values, or from the last "
            "frames themselves. Guidance, masks, start images and our attention and cache nodes act in every block.",
            search_aliases=["AR video", "autoregressive video", "causal", "Self-Forcing", "Causal Forcing", "KV cache", "rolling forcing", "long video",
                            "infinite video", "LongSANA", "streaming", "continue video", "SamplerARVideo", "CausVid"],
            inputs=[
                io.Model.Input("model", tooltip="A video model: block-causal Wan for keys, one that goes on from clean frames (Wan 2.2 TI2V) for frames."),
                io.Int.Input("frames_per_block", default=3, min=1, max=256,
                    tooltip="Latent frames that are made at once, as the model was trained; the first block takes what is left over. More see each other, "
                            "and cost more memory."),
                io.Combo.Input("memory", options=list(MEMORIES),
                    tooltip="keys: the keys and values of finished frames, for models distilled to blocks (Self-Forcing, Causal Forcing). frames: the last "
                            "frames stay in the sequence, for models trained to go on from clean ones (Wan 2.2 TI2V)."),
                io.Int.Input("window_blocks", default=0, min=0, max=256,
                    tooltip="Finished blocks that a block looks back on. Fewer keep memory and time a block flat; 0 is all of them for keys, one for frames."),
                io.Int.Input("sink_frames", default=0, min=0, max=256, advanced=True,
                    tooltip="First latent frames of the clip that stay in view whatever the window. A few steady long videos."),
                io.Combo.Input("key_dtype", options=list(STORED), advanced=True,
                    tooltip="How keys and values are kept. fp8_e4m3 and int8 take half of 16 bits; int8 is the closer one."),
                io.Combo.Input("keep_keys_on", options=["device", "cpu"], advanced=True,
                    tooltip="cpu: in main memory, copied at every use. Slower, for long windows that do not fit on the device; the video is the same."),
                io.Float.Input("context_noise", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
                    tooltip="Noise level of a finished block when its keys are taken, 0 to 1. 0 is as most models were trained; a little forgives "
                            "small flaws."),
                io.Sampler.Input("sampler", optional=True,
                    tooltip="What denoises a block, for example euler for models that were not distilled. Not connected: to the clean frames and noised anew "
                            "in every step, as core's AR sampler does."),
                *state_inputs(),
                *prompt_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="For the guider. Further nodes may come between."),
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced, with sigmas that end at 0 and a latent of the whole length."),
                VideoStateSocket.Output(display_name="state", tooltip="Filled by the run where keep_state is on, for Save Video State."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, model, frames_per_block, memory, window_blocks, sink_frames, key_dtype, keep_keys_on, context_noise, sampler=None,
                state=None, keep_state=False, prompt_blocks="", prompt_2=None, prompt_3=None, prompt_4=None, prompt_5=None):  # fmt: skip
        feature = feature_of(
            memory, cls.hidden.unique_id, frames_per_block, window_blocks, sink_frames, key_dtype, keep_keys_on
        )
        kept = VideoState()
        made = BlockSampler(
            NAME,
            frames_per_block,
            feature.memory,
            inner=sampler,
            context_noise=context_noise,
            prompts=prompts_of(prompt_blocks, [prompt_2, prompt_3, prompt_4, prompt_5]),
            resume=None if state is None else state.taken(NAME),
            keep=kept if keep_state else None,
            node=cls.hidden.unique_id,
        )
        return io.NodeOutput(attach(model, feature), made, kept)
