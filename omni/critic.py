"""
A language model as judge, behind any endpoint that speaks OpenAI's chat completions.

Why: whether an answer to an open question is good, no rule can say. The paper asks GPT-4o for a score of 1 to
5 (section 4.2). Such scores depend on the judge and its prompt, so both stand beside the figure, and every
answer of the judge is kept. The prompt is in our own words: scores compare with each other, not with the
paper's.
"""
import os
import re
from concurrent.futures import ThreadPoolExecutor

PROMPT = """You judge the answer of a voice assistant. It was spoken, and you read what was said.

Question: {question}
Answer: {answer}

Give a whole number from 1 to 5 for how good the answer is as a spoken one: 5 is correct, to the point and
easy to follow by ear; 3 is usable with flaws; 1 is wrong, empty, off the question or impossible to listen to.
Reply with JSON alone: {{"score": number}}"""


def score_of(answer):
    """The score in a judge's answer, 1 to 5, or None."""
    found = re.search(r'"score"\s*:\s*"?([1-5])(?:\.0)?\b', answer or "")
    return found and int(found[1])


def scores(pairs, address, model, timeout=60):
    """[(question, answer)] -> yields (score 1 to 5 or None, what the judge said or why it did not), in order.
    A judge that times out or answers nonsense costs one score, nothing else. The key is OPENAI_API_KEY."""
    import openai
    client = openai.OpenAI(base_url=address, api_key=os.environ.get("OPENAI_API_KEY", "none"),
                           timeout=timeout, max_retries=2)

    def ask(pair):
        prompt = PROMPT.format(question=pair[0], answer=pair[1])
        try:
            reply = client.chat.completions.create(model=model, temperature=0, max_tokens=200,
                                                   messages=[{"role": "user", "content": prompt}])
            said = reply.choices[0].message.content or ""
        except (openai.OpenAIError, IndexError) as e:
            return None, f"{type(e).__name__}: {e}"
        return score_of(said), said
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(ask, pairs)
