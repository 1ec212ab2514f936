"""
Build the corpus that train.py reads; lay out its rows; make batches of them.

Why: a spoken dialogue becomes three things that a network can learn from: the user's speech, the text of the
reply, and the reply's speech as units (25 integers a second). Dialogues come from many sources, and what a
source lacks is made: a synthesizer says what was not recorded, a codec turns the replies' speech into units.

    source        the dialogues                     the user's speech       the replies' units
    tiny          tiny/world.py draws them          espeak-ng, in rooms     espeak-ng, nano codec
    instructs2s   the released JSON                 its recordings or none  from the JSON
    folder        --path, a JSONL or CSV file       your recordings         your recordings or --tts, --codec
    text          --path, a JSONL or CSV file       --tts, several voices   --tts, --codec
    vocalnet, slam, hub: corpora of others, see omni/others.py

How: python data.py                          builds the embedded corpus in corpus/tiny
     python data.py config/data_folder.py    your own; the config files say what the input looks like
     python data.py --show 0                 prints row 0 as training sees it
A killed build continues with the shards that are missing. Ranks share them, also across machines that see the
folder: `torchrun data.py ...`, or `RANK=0 WORLD_SIZE=2 python data.py ...` on the first of two. A row is a
dialogue: id, voice, topics [str], users [str], speech [audio], samples [int], replies [str], spoken [str],
answers [str], units [[int]]. speech holds WAV bytes or a path below audio_root, samples is its length at 16
kHz, spoken is the reply with marks for how it is said (omni/espeak.py), and an answer is the part of a reply
that makes it right, for eval.py ("Paris"). What cannot be trained on is left out, counted, and listed with
its reason in left_out.jsonl. How a corpus is built is in omni/corpus.py; here is what training reads it with.
"""
import atexit
import functools
import heapq
import multiprocessing
import os
import random
import shlex
import shutil
import signal
from dataclasses import dataclass

import datasets
import torch

from model import IGNORE, SPEECH, expand_speech, speech_sequence
from omni import checkpoint, corpus
from omni.audio import clip_frames, log_mel, read_wav, speech_positions
from omni.configure import configure, fail
from omni.espeak import ASSISTANT


@dataclass(frozen=True)
class DataConfig:
    source: str = "tiny"               # tiny (the embedded world), instructs2s, folder, text ...: see above
    out_dir: str = "corpus/tiny"       # where the corpus goes
    path: str | None = None            # all but tiny: the dialogues, a .json array, a .jsonl or a .csv file
    columns: tuple[str, ...] = ()      # hub: which column is what, as in users=question,replies=answer
    audio_root: str | None = None      # the folder of the recordings; without it instructs2s gets no speech
    tts: str | None = None             # command: says stdin or {text} into {wav}, in {voice}; none: espeak-ng
    voices: tuple[str, ...] = ()       # text, tiny: the users'; text: or a language, as de; none: English
    assistant: str = ASSISTANT         # the voice of the replies
    held_out: float = 0.005            # all but tiny: share of dialogues for validation, and as much for test
    limit: int = 0                     # all but tiny: stop after so many dialogues; 0: never
    train: int = 20000                 # tiny: dialogues for training
    validation: int = 200              # tiny: dialogues for the loss and the figures during training
    test: int = 1000                   # tiny: dialogues for eval.py: other sentences, replies and voices
    people: bool = True                # tiny: let shipped clips of people's voices ask training questions
    augment: bool = True               # tiny: put training questions into rooms, noise, microphones, codecs
    condition: str | None = None       # tiny: put all questions into this one: babble, fan, room or telephone
    codec: str = "tiny/codec.pt"       # makes the units: a file, or CosyVoice 2's folder; not for instructs2s
    shard: int = 500                   # dialogues between two saves: what a killed process loses
    processes: int = os.cpu_count()    # how many work at once on this machine
    seed: int = 1337                   # of the dialogues and the voices
    show: int | None = None            # print this row of the training split as train.py sees it, and stop
    llm: str = "tiny/qwen2"            # show: whose tokenizer; a folder, or hf:owner/name

    def __post_init__(self):
        for key, known in (("source", corpus.SOURCES), ("condition", (None, *corpus.CONDITIONS))):
            if getattr(self, key) not in known:
                known = ", ".join(filter(None, known))
                raise ValueError(f"{key} is {getattr(self, key)!r}; it must be one of {known}")
        if min(self.train, self.validation, self.test, self.processes, self.shard) < 1:
            raise ValueError("train, validation, test, processes and shard must be at least 1")
        if self.limit < 0 or not 0 <= self.held_out < 0.5:
            raise ValueError("limit must be 0 or more, held_out at least 0 and below 0.5")
        if self.source != "tiny" and not self.path:
            raise ValueError(f"source {self.source} needs --path, the file with the dialogues")
        if self.source in ("folder", "vocalnet", "slam") and not self.audio_root:
            raise ValueError(f"source {self.source} needs --audio_root, the folder of its recordings")
        if self.tts is not None:
            words = shlex.split(self.tts)              # its ValueError names an open quotation mark
            if "{wav}" not in self.tts or not shutil.which(words[0]):
                raise ValueError(f"tts {self.tts!r} must be an installed command that writes to {{wav}}")
            if "{voice}" in self.tts and not self.voices and self.source == "text":
                raise ValueError("tts has a {voice}; name some with --voices, and one with --assistant")


# ------------------------------------------------------------------------------ a dialogue as a row

def chat_segments(tokenizer):
    """The chat template without what is said in it -> (ids up to the first reply, ids from one reply to the
    next), each with one SPEECH in place of the user's clip. The second begins with `<|im_end|>`.

    Replies are tokenized by themselves and put between: at the joints no token can form that one side does
    not have, so the prompt of a turn always continues the turns before. Raises ValueError if the template
    does not allow it.
    """
    mark, user = "[reply]", {"role": "user", "content": "<speech>"}
    messages = [user, {"role": "assistant", "content": mark}] * 2 + [user]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    one_turn = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    first, *between = text.split(mark)
    if first != one_turn or len(between) != 2 or between[0] != between[1]:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} changes with later turns; take a "
                         "Qwen2.5 Instruct model")
    speech = tokenizer.convert_tokens_to_ids("<speech>")

    def ids(text):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [SPEECH if token == speech else token for token in tokens]

    return ids(first), ids(between[0])


def chat_ids(tokenizer, replies):
    """Token ids of a spoken dialogue, up to the assistant's next turn: user, reply, user, reply ... user.

    replies  the texts of the assistant's earlier turns, a list of n
    Returns  the ids up to and including the generation prompt, one SPEECH for each of the n + 1 user turns.
    """
    first, between = chat_segments(tokenizer)
    ids = list(first)
    for reply in replies:
        ids += tokenizer(reply, add_special_tokens=False)["input_ids"] + between
    return ids


def clips(row):
    """The user's turns of a row, each float32 (samples,) at 16 kHz. Raises ValueError if there are none."""
    if not row["speech"]:
        raise ValueError(f"dialogue {row['id']} holds no speech")
    return [torch.from_numpy(read_wav(audio)) for audio in row["speech"]]


class Dialogues(torch.utils.data.Dataset):
    """The corpus as train.py wants it: item i is a dialogue, laid out for all stages.

    ids           (L,) the LLM's input, SPEECH at every position that a clip fills
    labels        (L,) the assistant's text (every turn, `<|im_end|>` included), IGNORE elsewhere
    mels          the user turns, each (n_mels, frames)
    turns         for each reply (ids, rows, labels) of the speech LM, as `speech_sequence` lays it out,
                  except that rows point at the position in `ids` whose state predicted the token
    """

    def __init__(self, rows, tokenizer, tts_tokenizer, n_mels, R, W, pad_audio=False, hear=True):
        """hear=False leaves out the user's speech: stage 1 TTS does not need it."""
        self.rows, self.tokenizer, self.n_mels, self.pad, self.hear = rows, tokenizer, n_mels, pad_audio, hear
        self.R, self.W = R, W
        self.first, self.between = chat_segments(tokenizer)
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.sep, self.unit_offset = tts_tokenizer.convert_tokens_to_ids(["<sep>", "<0>"])
        self.eos = tts_tokenizer.eos_token_id

    def __len__(self):
        return len(self.rows)

    def lengths(self):
        """For each dialogue, without touching its sound: (positions of the LLM, positions of the speech
        LM)."""
        names, rows = ["replies", "units", "samples"], self.rows
        if isinstance(rows, datasets.Dataset):        # without the paths, which would read all columns
            rows = rows.select_columns(names).with_format(None)
        for at in range(0, len(self), 1000):          # in pieces: 200,000 dialogues are 200 million units
            replies, units, samples = (rows[name][at:at + 1000] for name in names)
            texts = [reply for row in replies for reply in row]
            tokens = iter([len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]])
            for row, row_units, clips in zip(replies, units, samples):
                speech = sum(speech_positions(clip_frames(n, self.pad)) for n in clips) if self.hear else 0
                text = sum(next(tokens) + 1 for _ in row)                    # with `<|im_end|>`
                template = len(self.first) + (len(self.between) - 1) * (len(row) - 1) - len(row)
                yield template + speech + text, text + len(row) + sum(map(len, row_units))

    def mels(self, row):
        """The user's turns of a row, each a log-mel (n_mels, frames)."""
        return [log_mel(wav, self.n_mels, self.pad) for wav in clips(row)]

    def prompt(self, i):
        """What the model is asked in the last turn of dialogue i: (ids with one SPEECH per clip, list of
        mels)."""
        row = self.rows[i]
        return chat_ids(self.tokenizer, row["replies"][:-1]), self.mels(row) if self.hear else []

    def __getitem__(self, i):
        row = self.rows[i]
        mels, frames = [], [0] * len(row["replies"])
        if self.hear:
            try:
                mels = self.mels(row)
            except (OSError, ValueError, RuntimeError) as e:
                raise ValueError(f"dialogue {row['id']} cannot be read: {e}") from e
            frames = [mel.shape[1] for mel in mels]
        ids, labels, turns = [], [], []
        for t, (reply, units) in enumerate(zip(row["replies"], row["units"])):
            prompt = expand_speech(self.between[1:] if t else self.first, frames[t:t + 1])
            text = self.tokenizer(reply, add_special_tokens=False)["input_ids"] + [self.end]
            labels += [IGNORE] * len(prompt) + text
            ids += prompt + text
            speech_ids, text_rows, targets = speech_sequence(
                text, units, self.sep, self.unit_offset, self.eos, self.R, self.W)
            before = len(ids) - len(text) - 1         # the position whose state predicts the first token
            turns.append((speech_ids, [before + n if n >= 0 else -1 for n in text_rows], targets))
        return {"id": row["id"], "mels": mels, "ids": ids, "labels": labels, "turns": turns}


# ---------------------------------------------------------------------------------- rows as a batch

def collate(items):
    """Items of `Dialogues` -> a batch, everything laid end to end. With L, F, S the sums over dialogues,
    clips, replies:

    names [B], lengths [B]
    ids, labels (L,)              a label is what its position is to predict: the next id, or IGNORE
    mel (n_mels, F), frames [C]   the clips
    speech_lengths [replies], speech_ids, speech_rows, speech_labels (S,)
                                  speech_rows: the position among L whose state is read, or -1
    """
    batch = {"names": [item["id"] for item in items], "lengths": [len(item["ids"]) for item in items],
             "frames": [], "speech_lengths": []}
    ids, labels, speech_ids, speech_rows, speech_labels = [], [], [], [], []
    for item in items:
        start = len(ids)
        ids += item["ids"]
        labels += [*item["labels"][1:], IGNORE]
        batch["frames"] += [mel.shape[1] for mel in item["mels"]]
        for turn_ids, turn_rows, turn_labels in item["turns"]:
            batch["speech_lengths"].append(len(turn_ids))
            speech_ids += turn_ids
            speech_rows += [start + row if row >= 0 else -1 for row in turn_rows]
            speech_labels += turn_labels
    columns = {"ids": ids, "labels": labels, "speech_ids": speech_ids, "speech_rows": speech_rows,
               "speech_labels": speech_labels}
    batch |= {key: torch.tensor(column) for key, column in columns.items()}
    if batch["frames"]:
        batch["mel"] = torch.cat([mel for item in items for mel in item["mels"]], 1)
    return batch


def positions_of(lengths, stage):
    """How many positions each dialogue takes in a stage. lengths: list of (LLM's, speech LM's), see
    Dialogues."""
    if stage == "stage1":
        return [llm for llm, _ in lengths]
    if stage == "stage1_tts":
        return [speech_lm for _, speech_lm in lengths]
    return [llm + speech_lm for llm, speech_lm in lengths]


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """The order of an epoch's n dialogues, a function of (seed, epoch) alone: a resumed run sees the same."""
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def deal(rows, positions, limit, processes=1):
    """Deal out the dialogues of a step to processes and micro-batches.

    rows       their numbers;  positions[row]: how many positions a dialogue takes
    limit      positions in a micro-batch, unless one dialogue has more
    Returns    for each process the same number of micro-batches, lists of rows: longest first, to the
               emptiest list.
    """
    n = 1
    while True:
        heap = [(0, i, []) for i in range(n * processes)]
        for row in sorted(rows, key=positions.__getitem__, reverse=True):
            total, i, own = heapq.heappop(heap)
            heapq.heappush(heap, (total + positions[row], i, [*own, row]))
        if max(heap)[0] <= limit or (n + 1) * processes > len(rows):
            lists = [own for _, _, own in sorted(heap, key=lambda x: x[1])]
            return [lists[rank::processes] for rank in range(processes)]
        n += 1


def start_worker(_):
    """Ctrl-C reaches the whole process group; workers ignore it and finish the step. They leave the cores to
    the process that trains."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def collate_shared(items):
    """`collate` in a worker: the batch goes into shared memory here, where a lack of it is raised. Left to
    the queue's own thread, the error is printed there, and the main process waits for ever."""
    batch = collate(items)
    for x in batch.values():
        if torch.is_tensor(x):
            x.share_memory_()
    return batch


@functools.cache
def kill_workers_at_exit():
    """Workers ignore SIGTERM, so kill them; torch would take their SIGCHLD for a failure."""
    def kill():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    atexit.register(kill)


def batches(dialogues, groups, workers):
    """Yields the batches that `groups`, lists of row numbers, ask for. It draws from no random generator but
    its own. Raises ValueError that names the dialogue that cannot be read."""
    if workers:
        kill_workers_at_exit()
    several = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    loader = torch.utils.data.DataLoader(             # fork: train.py cannot be imported
        dialogues, batch_sampler=groups, collate_fn=collate_shared if workers else collate,
        num_workers=workers, worker_init_fn=start_worker, generator=torch.Generator(), **several)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))     # until workers can
        loader = iter(loader)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
        yield from loader
    except (OSError, ValueError, RuntimeError) as e:  # the last line of a worker's traceback says why
        why = str(e).strip().splitlines()[-1]
        if "shared memory" in why:
            why = f"/dev/shm is full ({why}); `docker run --shm-size 1g`, fewer --workers, or --workers 0"
        raise ValueError(why) from e


# -------------------------------------------------------------------------------------- the command

def show(cfg):
    """Print one row as training sees it: texts, then id and label of each position of the LLM and the speech
    LM."""
    rows = corpus.load_corpus(cfg.out_dir, "train")
    if not 0 <= cfg.show < len(rows):
        fail(f"--show {cfg.show}: the training split has dialogues 0 to {len(rows) - 1}")
    try:
        tokenizers = checkpoint.new_tokenizers(cfg.llm, cfg.llm)
    except (OSError, ValueError) as e:
        fail(f"--llm: {e}")
    row = rows[cfg.show]
    item = Dialogues([row], *tokenizers, n_mels=80, R=3, W=10, hear=bool(row["speech"]))[0]
    print(f"dialogue {row['id']}, voice {row['voice']}")
    for t, (user, reply) in enumerate(zip(row["users"], row["replies"])):
        print(f"\nturn {t}\n  user   {user}\n  reply  {reply}")
        if item["mels"]:
            frames = item["mels"][t].shape[1]
            print(f"  clip   {row['samples'][t]} samples, {frames} log-mel frames, "
                  f"{speech_positions(frames)} LLM positions")
    print_sequence("LLM", tokenizers[0], item["ids"], [*item["labels"][1:], IGNORE])
    for t, (ids, _, labels) in enumerate(item["turns"]):
        print_sequence(f"speech LM, turn {t}", tokenizers[1], ids, labels)


def print_sequence(title, tokenizer, ids, labels):
    """A line for each position: its id, as text, and what it is to predict."""
    def name(token):
        return {SPEECH: "(speech)", IGNORE: "-"}.get(token) or repr(tokenizer.decode([token]))

    print(f"\n{title}: {len(ids)} positions\n{'position':>8}{'id':>8}  {'input':20}is to predict")
    for position, (token, label) in enumerate(zip(ids, labels)):
        print(f"{position:8}{token:8}  {name(token):20}{name(label)}")


if __name__ == "__main__":
    cfg = configure(DataConfig)
    if cfg.show is None:
        corpus.build(cfg)
    else:
        show(cfg)
