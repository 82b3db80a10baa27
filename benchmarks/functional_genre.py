"""Text of another genre than what dictionaries of a study were trained on."""

import numpy as np

from toyfeat.jobs.sources import locate
from toyfeat.models.decoder.pretrained import Pretrained
from toyfeat.models.decoder.tokens import token_windows


def mail_windows(
    model: Pretrained, num: int, length: int, start: int = 1
) -> np.ndarray:
    """Cut bodies of e-mails into windows ``[num, length]``, the same at every call.

    Headers are left out: a body begins after the first empty line.  ``toyfeat fetch
    mail`` fetches them.
    """
    files = sorted((locate("mail") / "easy-ham-1").glob("*.txt"))
    mails = [file.read_bytes().decode("utf-8", "ignore") for file in files]
    bodies = [mail.partition("\n\n")[2] for mail in mails]
    windows = token_windows(model.tokenizer, bodies, length, start=start)
    return windows[np.random.default_rng(0).permutation(len(windows))[:num]]
