"""A chat endpoint as a judge: a request a question, in parallel, asked again if not understood."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from gemma_scope_jax.cards.explain.chat_client import ChatClient, Stopped
from gemma_scope_jax.cards.explain.prompts import complaint, lengths, messages, parse
from gemma_scope_jax.cards.explain.questions import Answer, Question

ASKED = 3  # times, before an answer counts as not understood


class EndpointJudge:
    """Answers questions by chat. Close it when done."""

    method = "endpoint"

    def __init__(self, client: ChatClient):
        self.client, self.name = client, client.endpoint.name
        self.parallel = client.endpoint.concurrency
        self._pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="ask")

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """In order; an answer that does not have the form has `values` None."""
        try:
            return list(self._pool.map(self._ask, questions))
        except RuntimeError:  # closed meanwhile: nothing can be handed to the pool
            raise Stopped from None

    def _ask(self, question: Question) -> Answer:
        conversation, text = messages(question), ""
        for _ in range(ASKED):
            reply = self.client.ask(conversation, lengths(question)[1])
            if reply is None:
                break
            text = reply.text
            if (answer := parse(question, text, reply.logprobs)) is not None:
                return answer
            said = {"role": "assistant", "content": text or "(nothing)"}
            complain = {"role": "user", "content": complaint(question)}
            conversation = [*conversation, said, complain]
        return Answer(text)

    def close(self) -> None:
        """Wait for what is under way; what has not been sent is not."""
        self.client.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
