"""Counts how often prompt lookup's guesses are right: the table FOLLOWS of drafters/prompt_lookup.py.

    python tools/lookup_table.py DATA [--conversations 400]

DATA is a folder that `foretell distill` wrote. Its answers are read in steps, as in decoding: the continuations of the
newest tokens are followed as long as they are right, and the next step begins after the first token that none of them
guessed. (Counted at every token instead, long matches would look more reliable than they are at the start of a step.)
Guesses are counted by the length of their match and the number of better guesses beside them.
"""

import argparse
from collections import Counter
from pathlib import Path

from foretell.drafters.prompt_lookup import PromptLookup, _Index
from foretell.train.data import ConversationStore

DEEPEST, MATCHES, RANKS = 16, 12, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--conversations", type=int, default=400)
    args = parser.parse_args()
    lookup, made, true = PromptLookup(), Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    conversations = ConversationStore.open(args.data).conversations
    for each in conversations[:: max(1, len(conversations) // args.conversations)]:
        index = _Index(lookup.longest, lookup.shortest)
        for start, end in each.answers:
            now = start
            while now < end:
                tokens = each.tokens[:now]
                index.extend(tokens)
                places = list(index.continuations(tokens, lookup.candidates).items())
                for came in each.tokens[now:end][:DEEPEST]:  # a step: on as long as a guess is right
                    following: dict[int, list[tuple[int, int]]] = {}
                    for at, match in places:
                        if at < len(tokens):
                            following.setdefault(tokens[at], []).append((at + 1, match + 1))
                    for better, (token, where) in enumerate(following.items()):
                        key = (min(where[0][1] - 1, MATCHES), min(better, RANKS - 1))
                        made[key] += 1
                        true[key] += token == came
                    now += 1
                    places = following.get(came, [])
                    if not places:
                        break
    for match in range(1, MATCHES + 1):
        row = [f"{true[match, b] / max(1, made[match, b]):.2f}" for b in range(RANKS)]
        print(f"    ({', '.join(row)}),  # {match}: {[made[match, b] for b in range(RANKS)]}")


if __name__ == "__main__":
    main()
