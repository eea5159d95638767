"""Messages: the forms in which models read conversations, and each form as token ids.

    Human/Assistant text   "\\n\\nHuman: Hi\\n\\nAssistant: Hello", then eos; for models that have no form of their own
    ChatML                 "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>", where a model's
                           chat template makes just this of messages, and its tokenizer has the two tokens

Invariants: special tokens come from the form, never from what a message says, which is encoded as plain text. What the
assistant says is encoded apart from what stands before it, as every completion is, and so has the same ids where it was
sampled, where it is trained, and in the prompt of a later turn. An answer ends with the token that ends a turn in its
form: <|im_end|> in ChatML, else eos.

A chat template is a program. It is asked what it makes of a few conversations, in a process of its own that has little
time and memory, and what this module makes of them must be the same; so no template is believed, and none is run later.

Left out: functions that a conversation may call (`tools`), thinking (`reasoning_content`), other models' forms.
"""
import contextlib
import json
import os
import resource
import subprocess
import sys
from itertools import groupby
from typing import NamedTuple

from minirlhf.config import escaped, fail

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the form of Anthropic's hh-rlhf
ROLES = {"system": "", "developer": "\n\nDeveloper: ", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} ",
         "tool": "\n\nTool: "}  # how a message opens as text
LARGEST, MEMORY, SECONDS = 100_000, 1 << 30, 2  # of a template: characters, bytes, of the processor


class Message(NamedTuple):
    role: str  # one of ROLES
    text: str
    calls: tuple[str, ...] = ()  # of tools, each as JSON {"name": ..., "arguments": ...}


class Talk(str):
    """Human/Assistant text of some messages, for people and reward functions, that knows the messages themselves, of
    which the ids in a model's own form are made. where: "file:line", for a refusal."""

    def __new__(cls, text, messages=(), where=""):
        talk = super().__new__(cls, text)
        talk.messages, talk.where = messages, where
        return talk

    @classmethod
    def prompt(cls, messages, where):
        """What stands before an answer, which it opens."""
        return cls(as_text(messages) + ASSISTANT, messages, where)

    @classmethod
    def completion(cls, messages, where):
        """An answer, and what follows it up to a last one."""
        return cls(as_text(messages).removeprefix(ASSISTANT), messages, where)


class Form(NamedTuple):
    """What a ChatML template does beside the two tokens. It is plain values, for a checkpoint keeps it."""
    system: str | None = None  # the system message of a conversation that begins without one
    developer: bool = False  # whether this role has turns
    tool: str = ""  # how a tool's results are told: in a "turn" of that role, as a user's "response", or not at all
    calls: bool = False  # whether calls of tools are written, as <tool_call>...</tool_call>
    think: bool = True  # whether "</think>" in an answer is text like any other

    @classmethod
    def of(cls, state, special):
        """The form that a checkpoint keeps, or None. Raises ValueError where it is none for these special tokens."""
        form = cls(**state) if state is not None else None
        if form and (type(form.system) not in (str, type(None)) or form.tool not in ("", "turn", "response")
                     or {bool} != {type(flag) for flag in (form.developer, form.calls, form.think)}
                     or not {START.text, END.text} <= special.keys()):
            raise ValueError("its form of messages is not one, or lacks its tokens")
        return form


# ---- the forms, as pieces

class Piece(NamedTuple):
    text: str
    token: bool = False  # a special token, where the tokenizer has it
    answer: bool = False  # the assistant says it


START, END = Piece("<|im_start|>", token=True), Piece("<|im_end|>", token=True)


def spoken(messages):
    """Human/Assistant text, in pieces."""
    for m in messages:
        if m.role == "assistant":
            yield from (Piece(ASSISTANT), Piece(f" {m.text}", answer=True))
        else:
            yield Piece(ROLES[m.role] + m.text)


def chatml(messages, form):
    """ChatML, in pieces."""
    for n, m in enumerate(messages):
        beside = [k in range(len(messages)) and messages[k].role == "tool" for k in (n - 1, n + 1)]
        if m.role == "tool" and form.tool == "response":  # results one after another are one turn
            yield from () if beside[0] else (START, Piece("user"))
            yield from (Piece("\n"), Piece("<tool_response>", token=True), Piece(f"\n{m.text}\n"),
                        Piece("</tool_response>", token=True))
            yield from () if beside[1] else (END, Piece("\n"))
            continue
        answer = m.role == "assistant"
        yield from (START, Piece(f"{m.role}\n"), Piece(m.text, answer=answer))
        for k, call in enumerate(m.calls):
            yield Piece("\n" if k or m.text else "", answer=True)
            yield from (Piece("<tool_call>", True, True), Piece(f"\n{call}\n", answer=True),
                        Piece("</tool_call>", True, True))
        yield from (END._replace(answer=answer), Piece("\n"))


def chatml_prompt(messages, form):
    """The same from the default system message, where there is one and it is needed, to the answer's opening."""
    if form.system is not None and not (messages and messages[0].role == "system"):
        messages = [Message("system", form.system), *messages]
    return [*chatml(messages, form), START, Piece("assistant\n")]


def as_text(messages):
    shown = [m._replace(text="\n".join([m.text] * bool(m.text or not m.calls) + [*m.calls])) for m in messages]
    return "".join(piece.text for piece in spoken(shown))


# ---- as ids

def encode_pieces(tokenizer, pieces, ids=()):
    """-> ids, behind those that are given; (start, stop) of each answer in them. Text that no token and no answer's
    beginning or end divides is encoded as one."""
    ids, spans = [*ids], []
    for (token, answer), group in groupby(pieces, lambda p: (p.token and p.text in tokenizer.special, p.answer)):
        start, texts = len(ids), [piece.text for piece in group]
        ids += [tokenizer.special[text] for text in texts] if token else tokenizer.encode("".join(texts))
        if answer and spans and spans[-1][1] == start:
            spans[-1] = spans[-1][0], len(ids)
        elif answer and len(ids) > start:
            spans.append((start, len(ids)))
    return ids, spans


def encode_prompt(tokenizer, text):
    """A string or Talk -> its ids up to where the answer begins, and the (start, stop) of earlier answers in them."""
    if not isinstance(text, Talk):
        return tokenizer.encode_prompt(text), []
    check_places(tokenizer, text)
    if tokenizer.form:
        return encode_pieces(tokenizer, chatml_prompt(text.messages, tokenizer.form))
    return encode_pieces(tokenizer, [*spoken(text.messages), Piece(ASSISTANT)], [tokenizer.opening])


def encode_completion(tokenizer, text):
    """A string or Talk -> its ids, the end included."""
    if not isinstance(text, Talk):
        return tokenizer.encode_completion(text)
    check_places(tokenizer, text)
    if tokenizer.form:
        return encode_pieces(tokenizer, [*chatml(text.messages, tokenizer.form)][2:-1])[0]
    return encode_pieces(tokenizer, [*spoken(text.messages)][1:])[0] + [tokenizer.eos]


def end_of(tokenizer, text):
    """The token that ends the answer to a prompt."""
    return tokenizer.special[END.text] if isinstance(text, Talk) and tokenizer.form else tokenizer.eos


def check_places(tokenizer, talk):
    """Exits 2 where the form has no place for a message, or it is open which form is meant."""
    if tokenizer.open_form:
        fail(f"{talk.where}: messages, but {tokenizer.open_form}")
    form = tokenizer.form
    for m in talk.messages:
        what, way = "", "leave the record out, or tell it in the text of other messages"
        if m.role == "developer" and not (form and form.developer):
            what, way = "the role 'developer'", "name it 'system'"
        elif m.role == "tool" and not (form and form.tool):
            what = "the role 'tool'"
        elif m.calls and not (form and form.calls):
            what = "'tool_calls'"
        elif form and not form.think and m.role == "assistant" and "</think>" in m.text:
            what, way = "thinking in an answer, which its template takes out", "leave out what stands up to '</think>'"
        if what:
            name = "the ChatML of this model" if form else "Human/Assistant text, the form of this model,"
            fail(f"{talk.where}: {name} has no place for {what}; {way}")


def describe(form):
    """Its name, for a person."""
    if form is None:
        return "Human/Assistant text"
    return f'ChatML, with the system message "{escaped(form.system)}" where there is none' if form.system else "ChatML"


def about(tokenizer, texts, what):
    """A line that says in which form messages among some texts are read."""
    if count := sum(isinstance(text, Talk) for text in texts):
        yield f"{count:,} of {len(texts):,} {what} are messages, read as {describe(tokenizer.form)}"


# ---- what a template does

BLANKS, MARKS = " a\n{{ b }} <c> & \u00e9\n\n", "\n d <|im_start|> "  # all of it must stay as it is
USER, OTHER, ANSWER, SYSTEM = (Message(*said) for said in (
    ("user", BLANKS), ("user", "'f' \"g\""), ("assistant", MARKS), ("system", "e")))
DEVELOPER, TOOL = (Message(role, BLANKS) for role in ("developer", "tool"))
CALLS = '{"name": "f", "arguments": {"x": "<\u00e9>", "y": [1, null]}}', '{"name": "g", "arguments": {}}'
REQUIRED = ((USER,), (SYSTEM, USER), (USER, ANSWER, OTHER), (USER, OTHER), (ANSWER, USER), (USER, SYSTEM, OTHER),
            (SYSTEM, USER, ANSWER, Message("user", ""), Message("assistant", ""), OTHER))
OPTIONAL = {
    "developer": ((DEVELOPER, USER), (SYSTEM, DEVELOPER, USER, ANSWER, OTHER)),
    "tool": ((USER, ANSWER, TOOL), (SYSTEM, USER, ANSWER, TOOL, TOOL, ANSWER, OTHER, ANSWER, TOOL, OTHER)),
    "calls": ((USER, Message(*ANSWER[:2], CALLS), OTHER), (USER, Message("assistant", "", CALLS[1:]), OTHER)),
    "think": ((USER, Message("assistant", "<think>\nh\n</think>\n\ni"), OTHER),)}


def form_of(path, template, special, **tokens):
    """What a chat template makes of messages, as a Form; None where there is none, or it is not ChatML's.

    path: for a refusal; special: {text: id} of the tokenizer; tokens: what the template may name, as eos_token.
    """
    if not (isinstance(template, str) and len(template) < LARGEST and {START.text, END.text} <= special.keys()):
        return None
    talks = [*REQUIRED, *(talk for some in OPTIONAL.values() for talk in some)]
    made = dict(zip(talks, ask(path, template, talks, tokens)))

    def as_made(form, some):
        return all(made[talk] == "".join(piece.text for piece in chatml_prompt(talk, form)) for talk in some)

    plain = "".join(piece.text for piece in chatml_prompt([USER], Form()))
    _, opened, rest = (made[(USER,)] or "").removesuffix(plain).partition("<|im_start|>system\n")
    form = Form(rest.removesuffix("<|im_end|>\n") if opened else None)
    if not as_made(form, REQUIRED) or START.text in rest or END.text in (form.system or ""):
        return None
    for name, values in {"developer": [True], "tool": ["turn", "response"], "calls": [True]}.items():
        others = (form._replace(**{name: value}) for value in values)
        form = next((other for other in others if as_made(other, OPTIONAL[name])), form)
    return form._replace(think=as_made(form, OPTIONAL["think"]))


def ask(path, template, talks, tokens):
    """What a template makes of some talks, up to the answer that follows: texts, None where it fails. In a process of
    its own."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = f"import sys; sys.path[0] = {root!r}; from minirlhf import chat; chat.answer_parent()"
    asked = [[{"role": m.role, "content": m.text} | (
        {"tool_calls": [{"type": "function", "function": json.loads(call)} for call in m.calls]} if m.calls else {})
        for m in talk] for talk in talks]
    try:
        done = subprocess.run([sys.executable, "-c", program], input=json.dumps([template, asked, tokens]),
                              capture_output=True, text=True, encoding="utf-8")
    except OSError as error:
        fail(f"{path}: has a chat template, and the process that reads it cannot be started ({error})")
    if "No module named 'jinja2'" in done.stderr:
        fail(f"{path}: has a chat template, and what reads it is missing: pip install jinja2")
    return json.loads(done.stdout) if done.returncode == 0 else [None] * len(talks)


def answer_parent():
    """The other side of `ask`. Raises whatever goes wrong with the template as a whole."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise ValueError(message)

    for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS)):
        with contextlib.suppress(ValueError, OSError):  # where the system allows less, or knows no such limit
            resource.setrlimit(what, (most, most))
    template, talks, tokens = json.loads(sys.stdin.buffer.read())
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False} | options)
    jinja.globals["raise_exception"] = raise_exception
    program, made = jinja.from_string(template), []
    for talk in talks:
        try:
            text = program.render(messages=talk, tools=None, documents=None, add_generation_prompt=True, **tokens)
            made.append(text if len(text) < LARGEST else None)
        except Exception:
            made.append(None)
    sys.stdout.write(json.dumps(made))
