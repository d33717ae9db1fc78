"""What a user can do wrong, said in one sentence.

Every mistake that can be foreseen is refused at the door: the sentence names the value, what is allowed, and
what to do next. The command line prints it without a traceback and leaves with `exit_code`; a library caller
catches `ForetellError`. Anything else that is raised is a bug of ours and keeps its traceback.
"""


class ForetellError(Exception):
    """A mistake the user can mend: a missing file, a malformed checkpoint, no network, a full disk."""

    exit_code = 1


class UsageError(ForetellError):
    """A request that could never work as typed: an unknown name, flags that contradict each other."""

    exit_code = 2
