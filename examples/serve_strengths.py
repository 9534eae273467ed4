"""One question at several strengths, asked of a server by OpenAI's client.

    qadapter serve --adapter out
    python examples/serve_strengths.py --question "Why do we have leap years?"

The strength is a field of the request: vLLM hands on what stands in ``vllm_xargs``. All requests
are sent at once; the server decodes them in one batch.
"""

import argparse
import asyncio

import openai


async def answer(client: openai.AsyncOpenAI, question: str, strength: float) -> str:
    made = await client.chat.completions.create(
        model="qadapter",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=64,
        extra_body={"vllm_xargs": {"strength": strength}},
    )
    return made.choices[0].message.content or ""


async def main(argv: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--server", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--question", default="Why do we have leap years?")
    parser.add_argument("--strength", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0])
    options = parser.parse_args(argv)
    async with openai.AsyncOpenAI(base_url=options.server, api_key="none") as client:
        asked = [answer(client, options.question, strength) for strength in options.strength]
        answers = await asyncio.gather(*asked)
    for strength, text in zip(options.strength, answers, strict=True):
        print(f"strength {strength:g}: {text}\n")
    return answers


if __name__ == "__main__":
    asyncio.run(main())
