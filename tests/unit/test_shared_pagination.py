import pytest

from detflow.errors import InvalidArgument
from detflow.pagination import decode_token, encode_token


def test_token_gives_back_its_key() -> None:
    assert decode_token(encode_token("q", "d123"), "q") == ["d123"]
    assert decode_token(encode_token("q", 7), "q", int) == [7]
    assert decode_token("", "q") is None


# The digest holds no secret, so these tokens are "right" but for what is in them.
@pytest.mark.parametrize("key", [(), (1,), (None,), ([],), ({},), (1.5,), (True,), ("a\0b",)])
def test_forged_text_token_is_refused(key: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode_token(encode_token("q", *key), "q")
    assert caught.value.reason == "BAD_PAGE_TOKEN"


@pytest.mark.parametrize("key", [(), ("7",), (None,), (2**63,), (1.0,), (False,)])
def test_forged_number_token_is_refused(key: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode_token(encode_token("q", *key), "q", int)
    assert caught.value.reason == "BAD_PAGE_TOKEN"


@pytest.mark.parametrize("token", ["é", "=", "a", "%00", "A" * 1024])
def test_garbage_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgument):
        decode_token(token, "q")


def test_token_of_another_query_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        decode_token(encode_token("q", "d123"), "other")
