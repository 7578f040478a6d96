"""Writes tokenizer_ids.json.gz here: what Hugging Face's tokenizer makes of a few hundred texts.

    python make_tokenizer.py <folder with Gemma 3's tokenizer.json and tokenizer_config.json>

It needs the packages tokenizers and jinja2; the tests need neither. Ids come from the published
tokenizer.json through `tokenizers`, chats from the published chat template through jinja2.

No text here holds U+2581 beside a space: SentencePiece takes the two for two spaces, and so do we,
but `tokenizers` does not.
"""

import gzip
import json
import random
import sys
from pathlib import Path

import jinja2
from tokenizers import Tokenizer

SENTENCES = """The capital of France is Paris.
It was the best of times, it was the worst of times; nobody agreed which.
Don't you think we'd've gone if they'd asked? "No," she said -- 'never'.
Alle Menschen sind frei und gleich an Würde und Rechten geboren.
Tous les êtres humains naissent libres et égaux en dignité et en droits.
Todos los seres humanos nacen libres e iguales en dignidad y derechos.
Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.
Todos os seres humanos nascem livres e iguais em dignidade e em direitos.
Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.
Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.
Minden emberi lény szabadon születik és egyenlő méltósága és joga van.
Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.
Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.
Alla människor är födda fria och lika i värde och rättigheter.
Все люди рождаются свободными и равными в своем достоинстве и правах.
Всі люди народжуються вільними і рівними у своїй гідності та правах.
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.
כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.
يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.
تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند.
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।
সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।
மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ
人人生而自由,在尊严和权利上一律平等。
人人生而自由,在尊嚴和權利上一律平等。他們賦有理性和良心。
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.
Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.
ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.
Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ։
ሁሉም የሰው ልጅ ነጻ ሆኖ የተወለደ ነው።
😀😃 family: 👨‍👩‍👧‍👦, flags: 🇫🇷🇯🇵, skin: 👍🏽, heart: ❤️, new: 🫠🪿
∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β ≡ ¬(¬α ∨ β), ∫₀^∞ e^{−x²} dx = √π⁄2
x = 3.14159265358979e-10 + 0xDEADBEEF * 1_000_000 % 7 // 2
1234567890 12,345.67 2024-02-29T23:59:59Z +1 (555) 010-9999 ½ ⅓ ² ³ Ⅷ ①
https://example.org/a/b?q=1&r=%20two#frag user.name+tag@example.com C:\\Windows\\System32
zalgo: z̴͝a̸l͠g̵o̶ café cafe\u0301 ﬁne ﬂow ＦＵＬＬ ｗｉｄｔｈ İstanbul ıı ß ẞ
ᚠᚢᚦᚨᚱᚲ 𐎠𐎡𐎢 𝔊𝔢𝔪𝔪𝔞 𓀀𓁐 ꙮ ௵ ﷽ 🜁
supercalifragilisticexpialidocious antidisestablishmentarianism Donaudampfschifffahrt
ALL CAPS SHOUTING, camelCaseIdentifier, snake_case_name, kebab-case-name, SCREAMING_SNAKE
a\u00a0b\u2003c\u200bd\ufeffe\u2028f\u2029g\u0085h
a▁b ▁
\x00\x01\x1b[31mred\x1b[0m\x7f
<table><tr><td>1</td></tr></table><b>bold</b> <i>it</i><code>x</code><div></div><tt>no</tt>
<h1>Title</h1><ul><li>one</li></ul><img><bbox></s><s> <0x41> <0xE2> <unknown> < table>
{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}
!!!??? ... ----- ===== ##### ***** ~~~~~ ``````` $$$$$ %%%%% ^^^^^ &&&&& @@@@@"""

BLOCKS = [
    "def f(x: int) -> str:\n    if x > 0:\n        return f'{x:>8}'\n\n    raise ValueError(x)\n",
    "for (int i = 0; i < n; ++i) {\n\tif (a[i] != b[i]) {\n\t\treturn false;\n\t}\n}\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n\n* one\n  * two\n    * three\n",
    "SELECT *\r\nFROM t\r\nWHERE x = 'y'\r\n\r\n;",
    "\n\n leading newlines, trailing spaces   \n\t\n",
    "key:\n  - a\n  -   b\n\n\n\n\t\tmixed \t tabs\t \tand spaces",
    "",
    " ",
    "\n",
]


def texts() -> list[str]:
    rng = random.Random(0)
    out = SENTENCES.split("\n") + BLOCKS
    for char in " \n\t":
        for count in (2, 3, 7, 30, 31, 32, 33, 62, 65):
            out += [char * count, f"a{char * count}b"]
    for _ in range(60):  # all of Unicode but surrogates, in short random texts
        points = [
            rng.choice(
                [rng.randrange(0x250), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]
            )
            for _ in range(12)
        ]
        out.append("".join(map(chr, points)))
    words = " ".join(SENTENCES.split("\n")).split(" ")
    for _ in range(60):  # words of every script, glued with every kind of white space
        glue = [" ", "  ", "\n", "\t", "", "\n\n", " \n", "\r\n", ", "]
        out.append("".join(rng.choice(words) + rng.choice(glue) for _ in range(10)))
    return out


CHATS = [
    [("user", "Hello")],
    [("user", "  Hello,\n\nwho are you? \n"), ("assistant", " A model.\n"), ("user", "Fine.")],
    [("system", "Answer in French."), ("user", "Where is Paris?")],
    [("system", "\nEnds with newlines.\n\n"), ("user", "\tOne\n"), ("assistant", "Two")],
    [("system", "  Indented"), ("user", "日本語で 😀"), ("assistant", "はい"), ("user", "▁x")],
]


def main(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = jinja2.Template(config["chat_template"])
    encoded = [[t, tokenizer.encode(t, add_special_tokens=False).ids] for t in texts()]
    chats = []
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        for prompt in (True, False):
            rendered = template.render(
                messages=messages, add_generation_prompt=prompt, bos_token="<bos>"
            )
            ids = tokenizer.encode(rendered, add_special_tokens=False).ids
            chats.append([messages, prompt, rendered, ids])
    rows = [f'{{"texts": [\n{_lines(encoded)}],', f'"chats": [\n{_lines(chats)}]}}\n']
    data = gzip.compress("\n".join(rows).encode(), mtime=0)
    (Path(__file__).parent / "tokenizer_ids.json.gz").write_bytes(data)


def _lines(rows: list) -> str:
    return ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
