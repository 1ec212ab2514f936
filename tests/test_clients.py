"""Clients of the server that nobody here wrote, unmodified, with a small random model: turns, sound and
interruptions. They have packages of their own, so each runs where a variable says that it is installed:

    AGENTS=folder         where `npm install @openai/agents` was run
    PIPECAT=python        of a virtual environment with `pip install "pipecat-ai[openai,silero]"`
openai's own client is in requirements.txt, and in tests/test_serve.py.
"""
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import soxr
from conftest import ROOT
from test_serve import Server

from omni.espeak import speak

CLIENTS = ROOT / "tests" / "clients"


@pytest.fixture(scope="module")
def server(tiny):
    made = Server(tiny)
    yield made
    made.server.should_exit = True
    made.thread.join()


@pytest.fixture(scope="module")
def question(tmp_path_factory):
    path = tmp_path_factory.mktemp("clients") / "question.pcm"
    wav = soxr.resample(speak("What is the capital of France?", "en-us+m3:160:50"), 16000, 24000)
    (np.clip(wav, -1, 1) * 32767).astype("<i2").tofile(path)
    return path


def ask(server, *command):
    """Run a client -> what it printed last, as JSON."""
    url = f"ws://127.0.0.1:{server.port}/v1/realtime"
    words = [str(word).replace("URL", url) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif("AGENTS" not in os.environ, reason="@openai/agents is not tested: see AGENTS above")
@pytest.mark.parametrize("mode", ["push", "vad"])
def test_openai_agents(server, question, mode):
    """Transcripts and sound of two turns; the second is interrupted, or interrupts what still plays."""
    script = shutil.copy(CLIENTS / "agents.mjs", os.environ["AGENTS"])
    got = ask(server, "node", script, "URL", question, mode)
    assert len(got["transcripts"]) == 2 and got["bytes"] > 4800 and got["interrupted"] >= 1
    assert set(got["errors"]) <= {"response_cancel_not_active"}      # what it cancels may be over


@pytest.mark.skipif("PIPECAT" not in os.environ, reason="Pipecat is not tested: see PIPECAT above")
def test_pipecat(server, question):
    got = ask(server, os.environ["PIPECAT"], CLIENTS / "pipecat_client.py", "URL", question)
    assert got["samples"] > 2400 and got["heard"] >= 2 and got["errors"] == []
