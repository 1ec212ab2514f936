// @openai/agents asks a spoken question of a server, twice, and interrupts: by session.interrupt() (push to
// talk), or by speaking while the reply plays (server_vad). Prints what came as JSON.
//     node agents.mjs ws://127.0.0.1:8000/v1/realtime question.pcm push|vad
import { OpenAIRealtimeWebSocket, RealtimeAgent, RealtimeSession } from "@openai/agents/realtime";
import { readFileSync } from "node:fs";

const [url, file, mode] = process.argv.slice(2), vad = mode === "vad";
const question = new Uint8Array(readFileSync(file)).buffer;        // PCM16, 24 kHz
const silence = new ArrayBuffer(48000 * 1.2);
const transport = new OpenAIRealtimeWebSocket({ url });
const session = new RealtimeSession(new RealtimeAgent({ name: "nano" }), { transport, model: "nano",
  config: { audio: { input: { turnDetection: vad ? { type: "server_vad", silence_duration_ms: 500 } : null } } } });
const got = { transcripts: [], bytes: 0, errors: [], interrupted: 0 }, count = {};
session.on("audio", event => { got.bytes += event.data.byteLength; });
session.on("audio_interrupted", () => { got.interrupted++; });
transport.on("*", event => {
  count[event.type] = (count[event.type] ?? 0) + 1;
  if (event.type === "response.output_audio_transcript.done") got.transcripts.push(event.transcript);
  if (event.type === "error") got.errors.push(event.error.code);
});

const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
async function until(type, n) {
  for (let i = 0; (count[type] ?? 0) < n; i++) {
    if (i > 1500) throw new Error(`no ${n} ${type}: ${JSON.stringify(count)}`);
    await wait(20);
  }
}
async function say(sound) {                                        // as fast as a microphone brings it
  for (let i = 0; i < sound.byteLength; i += 960) {
    session.sendAudio(sound.slice(i, i + 960));
    if (vad) await wait(20);
  }
}
async function ask() {
  await say(question);
  session.sendAudio(new ArrayBuffer(960), { commit: true });
  transport.sendEvent({ type: "response.create" });
}

await session.connect({ apiKey: "none" });
if (vad) {
  await say(question);
  await say(silence);
  await until("response.done", 1);
  await say(question);
  await say(silence);
  await until("response.done", 2);
} else {
  await ask();
  await until("response.done", 1);
  await ask();
  await until("response.output_audio.delta", 2);
  session.interrupt();
  await until("response.done", 2);
}
console.log(JSON.stringify(got));
process.exit(0);
