"""Pipecat's realtime service asks a spoken question of a server, and speaks again while the reply plays.
Prints what came as JSON: python pipecat_client.py ws://127.0.0.1:8000/v1/realtime question.pcm"""
import asyncio
import json
import sys

import numpy as np
import pipecat.frames.frames as frames
from pipecat.pipeline.pipeline import Pipeline
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.realtime import events
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService

try:
    from pipecat.pipeline.runner import PipelineRunner
    from pipecat.pipeline.task import PipelineParams, PipelineTask
except ImportError:                                   # newer names
    from pipecat.pipeline.worker import PipelineParams
    from pipecat.pipeline.worker import PipelineWorker as PipelineTask
    from pipecat.workers.runner import WorkerRunner as PipelineRunner

url, file = sys.argv[1:]
got = {"text": "", "samples": 0, "errors": [], "heard": 0}


class Listener(FrameProcessor):
    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        if isinstance(frame, frames.TTSAudioRawFrame):
            got["samples"] += len(frame.audio) // 2
        if isinstance(frame, frames.TTSTextFrame):
            got["text"] += frame.text
        if type(frame).__name__.endswith("UserStartedSpeakingFrame"):      # its prefix differs by version
            got["heard"] += 1
        if isinstance(frame, frames.ErrorFrame):
            got["errors"].append(frame.error)
        await self.push_frame(frame, direction)


async def main():
    hear = events.AudioInput(turn_detection=events.TurnDetection(silence_duration_ms=500))
    audio = events.AudioConfiguration(input=hear)
    settings = OpenAIRealtimeLLMService.Settings(
        model="nano", session_properties=events.SessionProperties(audio=audio))
    service = OpenAIRealtimeLLMService(api_key="none", base_url=url, settings=settings)
    params = PipelineParams(audio_in_sample_rate=24000, audio_out_sample_rate=24000)
    task = PipelineTask(Pipeline([Listener(), service, Listener()]), params=params, idle_timeout_secs=None)
    question, silence = np.fromfile(file, "<i2"), np.zeros(24000, "<i2")

    async def speak():
        await asyncio.sleep(1.5)
        for sound in (silence, question, silence, silence, question, silence, silence):
            for at in range(0, len(sound), 480):      # as fast as a microphone brings it
                await task.queue_frame(frames.InputAudioRawFrame(
                    audio=sound[at:at + 480].tobytes(), sample_rate=24000, num_channels=1))
                await asyncio.sleep(0.02)
        await asyncio.sleep(1)
        await task.queue_frame(frames.EndFrame())
    speaking = asyncio.create_task(speak())
    await asyncio.wait_for(PipelineRunner(handle_sigint=False).run(task), 60)
    await speaking
    print(json.dumps(got))

asyncio.run(main())
