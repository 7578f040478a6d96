"""A chat endpoint as a judge: one request per question, in parallel, asked again if need be."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from gemma_scope_jax.autointerp.judges.chat_client import ChatClient, Stopped
from gemma_scope_jax.autointerp.judges.replies import CUT, NoAnswer
from gemma_scope_jax.autointerp.prompts import complaint, lengths, messages, parse
from gemma_scope_jax.autointerp.questions import UNCLEAR, Answer, Question

ASKED = 3  # times, before a question has no answer
REPEATED = 2000  # characters of an answer that are quoted when it was not understood


class EndpointJudge:
    """Answers questions by chat. Close it when done."""

    method = "endpoint"

    def __init__(self, client: ChatClient):
        self.client, self.name = client, client.endpoint.name
        self.parallel = client.endpoint.concurrency
        self._pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="ask")

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in order; `values` is None without one in the required form."""
        try:
            answers = self._pool.map(self._ask, questions)
        except RuntimeError:  # the pool was closed
            raise Stopped from None
        return list(answers)

    def _ask(self, question: Question) -> Answer:
        """Ask; if the answer does not have the required form, say so and ask again."""
        first = conversation = messages(question)
        most = lengths(question)[1]
        read = lambda reply: parse(question, reply.text, reply.logprobs)
        fits = lambda reply: read(reply) is not None
        try:
            for _ in range(ASKED):
                reply = self.client.ask(conversation, most, fits, first)
                if not reply.is_cut and (answer := read(reply)) is not None:
                    return answer
                said = {"role": "assistant", "content": reply.text[:REPEATED] or "(nothing)"}
                conversation = [*conversation, said]
                conversation.append({"role": "user", "content": complaint(question)})
            if reply.is_cut:
                lost = NoAnswer(CUT, self.client.cut_off(self.client.body(conversation, most)))
            else:
                lost = NoAnswer(UNCLEAR, " ".join(reply.text[:80].split()) or "nothing is said")
            self.client.lose(lost)
        except NoAnswer as error:
            lost = error
        return Answer(lost.words, why=lost.why)

    def close(self) -> None:
        """Wait for requests under way; send no others."""
        self.client.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
