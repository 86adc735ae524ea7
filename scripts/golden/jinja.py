"""Writes tests/golden/jinja/cases.json: templates with what transformers renders from them.

usage: jinja.py FOLDER       needs jinja2 3.1.6 and transformers 5.24 (no torch)
A case is a template, and its text or the error that Python gives. All have the variables in `context`.
"""

import json
import random
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import _cached_compile_jinja_template

CONTEXT = {
    "messages": [
        {"role": "system", "content": "  Be kind.\n"},
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n5", "weight": 1.5},
        {"role": "user", "content": "naïve 你好 🌍 'quoted' \"double\""},
        {"role": "tool", "content": "", "name": "calc"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Adds <b>two</b> & more",
                "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "items": {"type": "array"}}},
                "strict": True,
                "x": None,
            },
        }
    ],
    "none_value": None,
    "number": 7,
    "negative": -7,
    "ratio": 2.5,
    "tiny": 1e-07,
    "large": 12345678901234567890,
    "flag": True,
    "words": ["pear", "Apple", "fig", "apple"],
    "pairs": {"b": 2, "a": 1, "C": [1, 2.0, None, True, "x"]},
    "text": "a-b-c",
    "spaces": "  a  b\tc \n",
    "empty": "",
    "nested": [[3, "c"], [1, "a"], [2, "b"]],
    "people": [
        {"name": "ann", "age": 3, "tags": ["x", "y"]},
        {"name": "Bob", "age": 1, "tags": []},
        {"name": "cid", "age": 3, "tags": ["z"]},
    ],
    "json_text": "line\nbreak\ttab \\ / \x7f \u2028 é",
    "add_generation_prompt": True,
}

# Each is printed by {{ }}.
EXPRESSIONS = """
1e-07 | 1.0 | true | none | 1e16 | 1e15 | 123456789.125 | 0.1 + 0.2 | 1/3 | 2/1 | 10**20 | 2**-1 | 2**0.5 | -2**2 | 2**3**2
-7 // 2 | 7 // -2 | -7 % 3 | 7 % -3 | 7.5 // 2 | -7.5 % 2 | 7 // 0 | 1 / 0 | 5 % 0 | 1.5 // 0.0 | -0.0 | 0.0 * -1
1_000 | 0x1f | 0o17 | 0b101 | 1_0.5e1_0 | 007 | 1.e3 | 1e400 | true + 1 | true * 3 | 'a' * 3 | 3 * 'a' | 'a' * -1 | [1] * 2 | (1, 2) * 2
'a' + 1 | 1 + 'a' | [1] + [2] | [1] + (2,) | (1,) + (2,) | {} + {} | none + 1 | 'a' - 'b' | -'a' | +true | -true | - -1
'a' ~ 1 ~ none ~ 1.0 ~ true ~ [1, 'x'] | 1 ~ 2 + 3 | 'x' ~ tiny | ratio ~ '' | undefined_name ~ 'x' | 1 + 2 ~ 3 * 4
[1, 2.0, 'x', none, true, {'a': (1, 2)}] | (1,) | () | (1, 2) | {'a': 1, 2: 'b', none: true} | {1: 'a', 1.0: 'b', true: 'c'} | ['it\\'s', "it's", 'say "x"', '\\n\\t\\\\', 'é', '\\x07', '\\u200b']
'\\u4f60\\x41\\101\\q\\'' | "a" "b" 'c' | 'line\\
joined' | pairs | words | messages[2] | tools[0].function.x | tools[0].function
1 < 2 < 3 | 1 < 3 < 2 | 1 == 1.0 | true == 1 | 'a' < 'b' | 'a' < 1 | [1, 2] < [1, 3] | none < 1 | none == none | 1 in [1.0] | 'a' in 'abc' | 1 in 'abc' | 'a' in pairs | 'z' not in pairs | 2 in range(3) | 'x' in undefined_name | 1 in 5 | (1, 2) == [1, 2] | {'a': 1} == {'a': 1.0}
not 1 == 2 | not true and false | true or 1/0 | false and 1/0 | 0 or 'x' | 'a' and 'b' | '' or none or [] | 1 if 0 else 2 | 1 if 0 | (1 if 0) is defined | 'a' if true else 'b' if false else 'c'
number is odd | number is even | ratio is even | number is divisibleby 7 | number is divisibleby(2) | 'a' is string | none is none | none_value is none | undefined_name is none | undefined_name is defined | none is defined
none is iterable | tools is iterable | 'abc' is iterable | 5 is iterable | undefined_name is iterable | none is sequence | [] is sequence | {} is sequence | 'x' is sequence | undefined_name is sequence | range(2) is sequence | (words|map('upper')) is iterable | (words|map('upper')) is sequence
pairs is mapping | [] is mapping | 1 is number | true is number | 1.0 is float | 1 is float | true is integer | true is boolean | 1 is boolean | true is true | 1 is true | false is false | 'abc' is lower | 'ABC' is upper | '' is lower | 3 is sameas 3 | none is sameas none | 1 is eq 1.0 | 1 is ne 2 | 1 is lt 2 | 3 is ge 3 | 'a' is in 'abc' | 1 is in [1] | range is callable | pairs.items is callable | 1 is callable | 'upper' is filter | 'nope' is filter | 'odd' is test | 1 is not none | 1 is foo
pairs.a | pairs['a'] | pairs.missing | pairs.missing is defined | pairs.missing.more | pairs['missing']['more'] | undefined_name.x | undefined_name | undefined_name + 1 | -undefined_name | undefined_name == undefined_name | undefined_name == none | undefined_name|length | undefined_name|list | undefined_name|tojson | undefined_name() | 'x'|default('y') | undefined_name|default('y') | ''|default('y') | ''|default('y', true) | none|default('y', boolean=true) | none|default('y')
pairs.items is defined | pairs.items | pairs.update | pairs.update is defined | pairs.pop('a') | words.append(1) | words.sort() | words.append is defined | pairs.keys() | pairs.values() | pairs.items() | pairs.keys()|list | pairs.items()|list|length | pairs.get('a') | pairs.get('z') | pairs.get('z', 5) | pairs.get() | pairs.copy() | pairs.keys()[0] | 'a' in pairs.keys() | 2 in pairs.values() | ('a', 1) in pairs.items() | tools[0].function.parameters.properties.items | tools[0].function.parameters.properties['items'] | words.count('fig') | words.index('fig') | words.index('zzz') | (1, 2, 1).count(1) | words.copy() | ''.__class__ | pairs._x
words[0] | words[-1] | words[9] | words[9] is defined | words['0'] | words.0 | text[0] | text[-1] | text[99] | words[1:] | words[:-1] | words[::-1] | words[::2] | words[-2:] | words[5:] | words[3:0:-1] | words[3:0:-2] | words[:0:-1] | text[::-1] | text[1:4] | text[-3:] | text[::-2] | text[10:20] | words[::0] | (1, 2, 3)[1:] | range(10)[2:5]|list | words['a':] | messages[3].content[5:9] | messages[3].content[::-1] | words[none:2] | words[true] | pairs[1:2] | none[0] | none.x | 5[0]
text.split('-') | text.split('-', 1) | text.split('-', maxsplit=1) | text.rsplit('-', 1) | text.rsplit('-') | spaces.split() | spaces.split(none, 1) | spaces.rsplit(none, 1) | ' a b '.rsplit(none, 1) | spaces.split(' ') | ''.split() | ''.split(',') | text.split('') | text.partition('-') | text.rpartition('-') | text.partition('x') | text.rpartition('x') | text.partition('') | 'a\\nb\\r\\nc\\n'.splitlines() | 'a\\nb\\n'.splitlines(true) | ''.splitlines() | 'a\\x0bb\\x85c\\u2028d'.splitlines()
spaces.strip() | spaces.lstrip() | spaces.rstrip() | 'xxaxx'.strip('x') | 'xyaxy'.strip('yx') | 'xxa'.lstrip('x') | 'axx'.rstrip('x') | 'a'.strip(none) | 'a'.strip(1) | text.startswith('a') | text.startswith(('x', 'a')) | text.startswith(['a']) | text.startswith('b', 2) | text.startswith('-', 1, 2) | text.endswith('c') | text.endswith(('x', 'c')) | text.endswith('b', 0, 3) | text.removeprefix('a-') | text.removesuffix('-c') | text.removeprefix('zz') | text.replace('-', '+') | text.replace('-', '+', 1) | text.replace('', '.') | text.replace('-', '') | text.replace('-', 1)
text.find('b') | text.find('z') | text.rfind('-') | text.index('b') | text.index('z') | text.rindex('-') | text.count('-') | 'aaaa'.count('aa') | 'abc'.count('') | messages[3].content.find('你') | text.find('-', 2) | text.find('-', 2, 3) | text.find('a', -1) | 'x'.find('') | 'hello world'.title() | "they're bill's".title() | 'hello WORLD'.capitalize() | 'Hello'.swapcase() | 'hello'.upper() | 'HELLO ß'.lower() | 'straße'.upper() | 'straße'.casefold() | 'ΑΣ'.lower() | 'a'.center(4) | 'ab'.center(5, '*') | 'abc'.center(6, '.') | 'a'.ljust(3) ~ '|' | 'a'.rjust(3, '0') | '42'.zfill(5) | '-42'.zfill(5) | 'a\\tb'.expandtabs() | 'a\\tb'.expandtabs(4) | 'a'.center(3, 'xx')
'12'.isdigit() | '²'.isdigit() | '²'.isdecimal() | '½'.isnumeric() | '1a'.isalnum() | 'é你'.isalpha() | ''.isalpha() | 'a b'.isalpha() | ' \\t'.isspace() | ''.isspace() | 'Ab'.istitle() | 'AB1'.isupper() | 'ab1'.islower() | '1'.isupper() | 'a_1'.isidentifier() | '1a'.isidentifier() | 'é'.isascii() | 'a\\n'.isprintable() | ','.join(['a', 'b']) | ','.join('abc') | ','.join([1]) | ','.join(pairs) | ''.join([])
'{} {}'.format(1, 'a') | '{1} {0}'.format(1, 2) | '{a} {b!r}'.format(a=1, b='x') | '{0[0]} {1.name}'.format([5], {'name': 'n'}) | '{:>5}|{:<5}|{:^5}'.format('a', 'b', 'c') | '{:*^7}'.format('mid') | '{:05d} {:+d} {:x} {:#x} {:b} {:o} {:X}'.format(42, 42, 255, 255, 5, 8, 255) | '{:.2f} {:8.3f} {:e} {:g} {:.3g} {:%}'.format(3.14159, 2.5, 12345.678, 0.00001, 1234567.0, 0.256) | '{:,} {:_} {:,.2f}'.format(1234567, 1234567, 1234567.891) | '{{}} {}'.format(1) | '{:{}}|'.format('a', 5) | '{:{w}.{p}f}'.format(2.0, w=8, p=3) | '{}'.format() | '{0} {}'.format(1, 2) | '{:d}'.format(1.5) | '{:d}'.format('x') | '{:s}'.format(1) | '{'.format() | '}'.format() | '{!s:>4}'.format(1) | '{:>8}'.format(true) | '{:5}'.format(none) | '{}'.format([1, 'a']) | '{:c}'.format(65) | '{:010.2f}'.format(-3.14159) | '{:=+8d}'.format(7) | '{a}'.format_map({'a': 3}) | '{:.3}'.format('abcdef') | '{:.3}'.format(3.14159) | '{: d}'.format(5) | '{:012,d}'.format(1234567) | '{:.0f}'.format(2.5) | '{:.1f}'.format(0.25) | '{:g}'.format(100000.0) | '{:g}'.format(1000000.0) | '{:#.3g}'.format(1.0) | '{:.2e}'.format(0) | '{}'.format(1e-07)
'%s and %d' % ('a', 5) | '%s' % 'x' | '%d%%' % 50 | '%5.2f|%-8s|%08d|%+d|% d' % (3.14159, 'ab', 42, 5, 7) | '%x %X %o %#x %e %g %E' % (255, 255, 8, 255, 12345.678, 0.0001, 0.5) | '%(a)s %(b)d' % {'a': 1, 'b': 2} | '%r %s' % ('a', 'a') | '%s' % none | '%s' % [1] | '%d' % 3.9 | '%d' % 'x' | '%s %s' % ('a',) | '%s' % ('a', 'b') | '%q' % 1 | '%c%c' % (65, 'b') | '%.3s|' % 'abcdef' | '%*d' % (5, 42) | '%.*f' % (2, 3.14159) | 'x' % () | 'x' % 1 | '%i' % true | '%-5d|' % 3 | '%05.1f' % -2.345 | '%a' % 'é' | '%s' % 1e-07 | '%g' % 1e20 | '%.10g' % 0.1 | '%%' % () | '%5s|%-5s|' % ('é', '你')
'%s-%s'|format(1, 2) | '%(x)s'|format(x=3) | ('a','b')|join('-') | [1, 2.0, none, true]|join(', ') | words|join | people|join(', ', attribute='name') | words|first | words|last | []|first | []|first is defined | 'abc'|first | 'abc'|last | words|length | 'naïve'|length | 5|length | pairs|length | (words|map('upper'))|length | words|count | words|reverse|list | 'abc'|reverse | words|sort | words|sort(reverse=true) | words|sort(case_sensitive=true) | people|sort(attribute='age')|map(attribute='name')|list | people|sort(attribute='age,name')|map(attribute='name')|list | nested|sort | nested|sort(attribute=1) | [3, 'a']|sort | pairs|dictsort | pairs|dictsort(by='value') | pairs|dictsort(case_sensitive=true, reverse=true)
words|unique|list | words|unique(case_sensitive=true)|list | [1, 3, 2]|max | [1, 3, 2]|min | []|max | words|min | people|max(attribute='age') | [1, 2, 3]|sum | [1.5, 2]|sum | people|sum(attribute='age') | ['a']|sum | []|sum(start=5) | words|map('upper')|list | words|map('replace', 'p', 'q')|list | people|map(attribute='tags.0', default='-')|list | people|map(attribute='zip')|list | words|map('length')|list | words|map|list | words|select('in', ['fig'])|list | [0, 1, 2]|select|list | [0, 1, 2]|reject|list | [1, 2, 3, 4]|select('even')|list | [1, 2]|reject('equalto', 1)|list | people|selectattr('age', 'equalto', 3)|map(attribute='name')|join(',') | people|rejectattr('tags')|map(attribute='name')|list | people|selectattr('name')|list|length | messages|selectattr('role', '==', 'user')|list|length | messages|selectattr('name', 'defined')|list|length
people|groupby('age')|length | people|groupby('age')|map(attribute='grouper')|list | people|groupby('age')|map(attribute='list')|map('length')|list | people|groupby('name')|map('first')|list | [1, 2, 3, 4, 5]|batch(2)|list | [1, 2, 3]|batch(2, 0)|list | [1, 2, 3, 4, 5]|slice(2)|list | [1, 2, 3]|slice(2, 'x')|list | pairs|items|list | 5|items|list | pairs|list | 'abc'|list | range(3)|list | range(1, 10, 3)|list | range(5, 0, -2)|list | range(3) | range(0, 3, 2) | range(100001) | range(0, 5, 0) | range(1.5)
'  x '|trim ~ '|' | 'xxaxx'|trim('x') | 'a b'|title | "it's-a (test) [of] foo_bar"|title | 'aBC dE'|capitalize | 'abc'|upper | 5|upper | none|lower | 'a'|center(5) ~ '|' | 'ab'|center(5) ~ '|' | 'a\\nb\\n\\nc'|indent | 'a\\nb'|indent(2, true) | 'a\\n\\nb'|indent(2, blank=true) | 'a\\nb'|indent('> ') | 'a\\nb\\n'|indent ~ '|' | ''|indent ~ '|' | 'hello big world of words'|truncate(11) | 'hello big world of words'|truncate(11, true) | 'hello'|truncate(3) | 'hello big world'|truncate(9, false, '!') | 'hello big world'|truncate(9, leeway=0) | 'the quick brown fox jumps'|wordwrap(10) | 'a verylongwordindeed b'|wordwrap(6) | 'one two'|wordcount | 'a,b c-d'|wordcount | '<a href="x">&\\'</a>'|escape | '<b>'|e | '<b>'|safe | 1.0|string | none|string | [1]|string | 'a b&c/d?é'|urlencode | {'a b': 'c&d', 'x': 1}|urlencode | 1000|filesizeformat | 123456789|filesizeformat | 1024|filesizeformat(true) | 1|filesizeformat | 500|filesizeformat
'42'|int | ' 42 '|int | '4_2'|int | '0x1f'|int(0, 16) | '1f'|int(base=16) | '3.7'|int | 'x'|int | 'x'|int(5) | 3.9|int | -3.9|int | none|int | true|int | '1e3'|int | '0b11'|int(0, 2) | 'z'|int(0, 36) | [1]|int | '3.5'|float | 'x'|float | 'x'|float(1.5) | 3|float | '1e-07'|float | 'inf'|float | 'nan'|float | '1_0.5'|float | undefined_name|int | 2.5|round | 3.5|round | 2.567|round(2) | 2.567|round(1, 'ceil') | 2.567|round(1, 'floor') | 5|round | 15|round(-1) | 25|round(-1) | 2.675|round(2) | 1234.5|round(-2) | 'x'|round | 7|round(2, 'floor') | -3|abs | -3.5|abs | 'x'|abs | true|abs
pairs|tojson | tools|tojson | json_text|tojson | json_text|tojson(ensure_ascii=true) | '🌍'|tojson(ensure_ascii=true) | pairs|tojson(indent=2) | []|tojson(indent=2) | {}|tojson(indent=4) | [[], {}, [1]]|tojson(indent=1) | pairs|tojson(separators=(',', ':')) | pairs|tojson(sort_keys=true) | pairs|tojson(indent='--') | (1, 2)|tojson | {1: 2, none: 3, true: 4, 1.5: 5}|tojson | 1e16|tojson | 1e-07|tojson | 1.0|tojson | large|tojson | 'inf'|float|tojson | none|tojson | '</script>'|tojson | range(3)|tojson | pairs.items()|tojson | words|map('upper')|tojson | pairs|tojson(indent=0) | [1]|tojson(2) | [1, 2]|tojson(none, 2) | pairs|tojson(2, sort_keys=true)
dict(a=1, b=2) | dict({'a': 1}, b=2) | dict([('a', 1)]) | namespace(a=1).a | namespace(a=1).b is defined | namespace(a=1) is mapping | words|attr('count') is callable | pairs|attr('a') | messages[0].content|trim|length | messages|map(attribute='role')|join(' ') | messages[-1]['role'] | messages[2].content.split('</think>')[-1].lstrip('\\n') | messages[2].content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') | (messages|length - 1) | messages|length - 1 * 2 | text|upper ~ '!' | text|replace('-', '+')|upper | text|replace('-', '+', 1) | 5|replace(5, 6) | -1|abs | -number|abs | (-7)|abs | number.bit_length() | 2.0.is_integer() | ratio.is_integer() | cycler('a', 'b').next() | joiner('|')() ~ 'x'
none() | 'x'() | text.nope() | text.nope is defined | text.upper | text.upper is defined | text.upper(1) | range() | raise_exception('boom') | no_such_function(1) | 'x'|no_such_filter
""".strip()

TEMPLATES = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ m.role }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% for i in [1, 2, 3] %}{{ loop.previtem }}<{{ i }}>{{ loop.nextitem }}{{ loop.first }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.index0 }};{% endfor %}",
    "{% for i in [1, 1, 2, 2] %}{{ loop.changed(i) }}{{ loop.cycle('a', 'b', 'c') }} {% endfor %}",
    "{% for i in [] %}x{% else %}none{% endfor %}",
    "{% for i in range(5) if i is odd %}{{ i }}{{ loop.length }}{% endfor %}",
    "{% for i in [1, 2] if i > 5 %}x{% else %}empty{% endfor %}",
    "{% for k, v in pairs.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k in pairs %}{{ k }}{% endfor %}",
    "{% for a, b in nested %}{{ b }}{{ a }}{% endfor %}",
    "{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}",
    "{% for (a, b), c in [((1, 2), 3)] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for c in 'héy' %}{{ c }}.{% endfor %}",
    "{% for x in none %}{% endfor %}",
    "{% for x in undefined_name %}a{% else %}b{% endfor %}",
    "{% for x in 5 %}{% endfor %}",
    "{% for i in range(10) %}{% if i == 3 %}{% continue %}{% endif %}{% if i == 6 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in [1, [2, [3]]] recursive %}{% if i is iterable %}({{ loop(i) }}){% else %}{{ i }}@{{ loop.depth }}{% endif %}{% endfor %}",
    "{% for i in [1, 2] %}{% for j in [3, 4] %}{{ i }}{{ j }}{{ loop.index }} {% endfor %}{{ loop.index }};{% endfor %}",
    "{% set x = 1 %}{% for i in [1, 2] %}{{ x }}{% set x = x + 1 %}{{ x }};{% endfor %}{{ x }}",
    "{% set ns = namespace(x=0, items='i') %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.items }}{{ ns.y is defined }}",
    "{% set ns = namespace(l=[]) %}{% for i in [1, 2] %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.l }}",
    "{% set pairs.a = 5 %}{{ pairs.a }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set t = 1, 2 %}{{ t }}{% set (c, d) = [3, 4] %}{{ c }}{{ d }}",
    "{% set a, b = [1] %}",
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools is none }}",
    "{% if not nope is defined %}{% set nope = 5 %}{% endif %}{{ nope }}",
    "{% if true %}{% set y = 1 %}{% endif %}{{ y }}",
    "{% set x %}a {{ number }}{% endset %}[{{ x }}]{{ x|length }}",
    "{% set x | upper | trim %} abc {% endset %}[{{ x }}]",
    "{% set x %}{% set inner = 1 %}{{ inner }}{% endset %}{{ x }}{{ inner is defined }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}",
    "{% filter upper %}abc {{ text }}{% endfilter %}",
    "{% filter replace('a', 'b') | upper %}banana{% endfilter %}",
    "{% macro f(a, b=2, c=a) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f(1) }} {{ f(1, c=5) }} {{ f(b=3, a=4) }} {{ f() }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(x=2) }}",
    "{% macro f(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, 3, x=4) }}{{ f.name }}{{ f.arguments }}",
    "{% macro f(a) %}{{ caller(a) }}{% endmacro %}{% call(x) f(5) %}<{{ x }}>{% endcall %}",
    "{% macro f() %}[{{ caller() }}]{% endmacro %}{% call f() %}body {{ number }}{% endcall %}",
    "{% macro f() %}x{% endmacro %}{% call f() %}y{% endcall %}",
    "{% macro fact(n) %}{% if n <= 1 %}1{% else %}{{ n * fact(n - 1)|int }}{% endif %}{% endmacro %}{{ fact(6) }}",
    "{% macro g() %}{{ later }}{% endmacro %}{% set later = 3 %}{{ g() }}",
    "{% macro f(x) -%}  {{ x }}  {%- endmacro %}[{{ f('a')|upper }}]{{ f('b') ~ 'c' }}{{ f('q') is string }}",
    "{% macro f() %}{% set z = 1 %}{% endmacro %}{{ f() }}{{ z is defined }}",
    "{{ f is defined }}{% macro f() %}{% endmacro %}{{ f is defined }}{{ f() == '' }}",
    "{% raw %}{{ not }} {% this %}{% endraw %}|{%- raw -%}  a {{ b }}  {%- endraw -%}  x",
    "  {% raw %}\n{{ x }}\n  {% endraw %}\ny",
    "a\n  {# comment #}\nb {# inline #} c\n{#- strip -#}\n d",
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
    "a\n  {%+ if true %}\n  b\n  {%+ endif +%}\nc\n\n",
    "a  {%- if true -%}  b  {%- endif -%}  c",
    "  {{ 1 }}\n  {{- 2 -}}  \n 3\n{{ 4 }}\n",
    "{% if true %}\n\nx\n\n{% endif %}\n\ny",
    "{% for i in [1, 2] %}\n  - {{ i }}\n{% endfor %}\nend",
    "   {% set x = 1 %}   {% set y = 2 %}\n z",
    "\t{% if true %}a{% endif %}\t\n{% if true %}\tb{% endif %}",
    "x {% if true %} y {% endif %} z",
    "a\r\nb\r{% if true %}\r\nc\r\n{% endif %}\r\nd\r\n",
    "{{ 'a\r\nb' }}",
    "text\n\n",
    "\n",
    "",
    "{{ '{{' }}{{ '}}' }}{{ \"{% x %}\" }}",
    "{{ {'a': {'b': 1}}.a.b }}{{ {'x': 1}['x'] }}{{ [[1, 2], [3]][0][1] }}",
    "{{-5}}{{+5}}{{ -5 }}{{ - 5 }}",
    "{% if 1 %}a{% elif 2 %}b{% else %}c{% endif %}{% if 0 %}a{% elif 2 %}b{% else %}c{% endif %}{% if 0 %}a{% elif 0 %}b{% else %}c{% endif %}",
    "{% if x is defined and x %}y{% endif %}{% if messages and messages[0] %}z{% endif %}",
    "{% block a %}in {{ number }}{% endblock %}{% block b %}{% endblock b %}",
    "{% autoescape true %}x{% endautoescape %}",
    "{% print 1, 'a' %}",
    "{% include 'x' %}",
    "{% if false %}{% include 'x' %}{% endif %}ok",
    "{% import 'x' as y %}",
    "{% do x %}",
    "{% if true %}",
    "{% endif %}",
    "{{ 1",
    "{{ }}",
    "{% for %}{% endfor %}",
    "{% set %}",
    "{{ 'abc }}",
    "{# open",
    "{{ (1 }}",
    "{{ a b }}",
    "{{ 1 is 2 is 3 }}",
    "{{ foo(a=1, 2) }}",
    "{{ $ }}",
    "{% unknown %}",
    "{% raw %}x",
    "{% macro f(a=1, b) %}{% endmacro %}",
    "{% set none = 1 %}",
    "{% generation %}{{ number }}{% set g = 1 %}{% endgeneration %}{{ g is defined }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
    "{% set loop_messages = messages[1:] %}{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}{{ m.role }}{% endfor %}",
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% endif %}{{ system }}|",
    "{%- for tool in tools %}\n{{- '\\n' }}{{- tool | tojson }}{%- endfor %}",
    "{%- set index = (messages|length - 1) - 1 %}{{ index }}",
    "{%- for message in messages[::-1] %}{{ loop.index0 }}{{ message.role[0] }}{% endfor %}",
    "{% macro render(args) %}{% for k, v in args|items %}{{ k }}:{{ v if v is string else v | tojson }};{% endfor %}{% endmacro %}{{ render(pairs) }}",
    "{% for k in pairs|dictsort %}{{ k[0] }}{{ k[1] }}{% endfor %}",
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'tool' and not ns.found %}{% set ns.found = true %}{{ m.name }}{% endif %}{% endfor %}{{ ns }}",
    "{{ messages[0].content is string and messages[0].content is not mapping }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}",
    "{% set j = joiner(', ') %}{% for i in [1, 2] %}{{ j() }}{{ i }}{% endfor %}",
    "{% set g = words|map('upper') %}{{ g|list }}{{ g|list }}",
    "{% set g = words|map('upper') %}{{ 'FIG' in g }}{{ g|list }}",
    "{% set x = [] %}{% for i in [1] %}{% set _ = x.append(i) %}{% endfor %}{{ x }}",
    "{% set _ = pairs.update({'z': 1}) %}{{ pairs }}",
    "{% if true: %}a{% endif %}",
    "{{ [1, 2, 3,] }}{{ {'a': 1,} }}{{ (1, 2,) }}{{ range(3,) }}",
    "{{ words|join(', ') if words else 'no' }}",
    "{{ 'a' if not flag else 'b' }}{{ flag and 'x' or 'y' }}",
    "{{ (words + ['x'])[-1] }}{{ (1, 2)[0] }}{{ ('a' ~ 'b')|upper }}{{ 'a' ~ 'b'|upper }}",
    "{% set x = 'a' %}{% set x = x ~ 'b' %}{{ x }}",
    "{{ {'a': 1}.items()|list }}{{ dict(a=1).get('a') }}{{ {}.get('b', {}).get('c', 'd') }}",
    "{{ range(3)|map('string')|join('') }}{{ range(3)[1] }}{{ range(3)[-1] }}{{ range(3)|last }}{{ range(3)|reverse|list }}",
    "{% for a in [1,2,3] %}{% set outer = loop %}{% for b in [1] %}{{ outer.index }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ loop.index0 }}{% if loop.nextitem is defined and loop.nextitem.role == 'tool' %}T{% endif %}{% endfor %}",
    "{{ caller is defined }}{{ loop is defined }}{{ varargs is defined }}",
]


def random_spacing(draw):
    """Tags with every kind of white space around them."""
    blanks = ["", " ", "  ", "\n", "\n\n", "\t", " \n ", "\n  ", "x", " x", "x ", "\nx\n", "x\n", "\r\n", "\n \n"]
    tags = ["if true", "set v = 1", "endif", "for i in [1, 2]", "endfor", "raw", "endraw"]
    out, open_tags = [], []
    for _ in range(draw.randint(2, 9)):
        out.append(draw.choice(blanks))
        begin, end = draw.choice(["", "", "-", "+"]), draw.choice(["", "", "-", "+"])
        kind = draw.randint(0, 5)
        if kind == 0:
            out.append("{{" + draw.choice(["", "-"]) + " 7 " + draw.choice(["", "-"]) + "}}")
        elif kind == 1:
            out.append("{#" + begin + " c\n " + end + "#}")
        elif kind == 2 and open_tags:
            out.append("{%" + begin + " " + open_tags.pop() + " " + end + "%}")
        elif kind == 3:
            out.append("{%" + begin + " set v = 1 " + end + "%}")
        elif kind == 4:
            out.append("{%" + begin + " raw " + draw.choice(["", "-"]) + "%}" + draw.choice(blanks) + "{%" + begin + " endraw " + end + "%}")
        else:
            tag, close = draw.choice([("if true", "endif"), ("for i in [1, 2]", "endfor"), ("filter upper", "endfilter")])
            open_tags.append(close)
            out.append("{%" + begin + " " + tag + " " + end + "%}")
    out.append(draw.choice(blanks))
    while open_tags:
        out.append("{% " + open_tags.pop() + " %}" + draw.choice(blanks))
    return "".join(out)


def random_expression(draw, depth):
    """Operators, filters and methods on values they may not fit."""
    if depth == 0:
        return draw.choice(
            ["number", "negative", "ratio", "tiny", "text", "words", "pairs", "flag", "none", "1", "0", "2.5", "-3", "'a'", "''",
             "'1.5'", "'12'", "[1, 'x']", "(1, 2)", "{'a': 1}", "spaces", "nested", "missing", "true", "1e10", "range(3)"]
        )
    inner = lambda: random_expression(draw, depth - 1)
    kind = draw.randint(0, 5)
    if kind == 0:
        operator = draw.choice(["+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", ">=", "and", "or", "in", "not in"])
        return f"({inner()} {operator} {inner()})"
    if kind == 1:
        filters = ["length", "upper", "list", "first", "last", "string", "int", "float", "tojson", "join('-')", "sort", "reverse",
                   "trim", "title", "capitalize", "default('d')", "default('d', true)", "abs", "round(1)", "sum", "unique", "min",
                   "replace('a', 'b')", "indent(2)", "center(7)", "dictsort", "items", "map('string')", "select", "batch(2)",
                   "wordcount", "escape", "max", "slice(2)", "map(attribute=0)", "tojson(indent=1)", "truncate(5)"]
        chosen = draw.choice(filters)
        lists = ["reverse", "unique", "items", "map('string')", "select", "batch(2)", "slice(2)", "map(attribute=0)"]
        return f"({inner()} | {chosen}{' | list' if chosen in lists else ''})"
    if kind == 2:
        tests = ["defined", "none", "string", "number", "mapping", "iterable", "sequence", "odd", "true", "integer", "float",
                 "boolean", "upper", "eq(1)", "in([1, 'a'])", "callable", "divisibleby(2)"]
        return f"({inner()} is {draw.choice(['', 'not '])}{draw.choice(tests)})"
    if kind == 3:
        methods = ["upper()", "split('-')", "strip()", "startswith('a')", "find('b')", "isdigit()", "title()", "get('a')",
                   "keys() | list", "items() | list", "count(1)", "index(1)", "replace('-', '')", "zfill(4)", "partition('-')",
                   "splitlines()", "a", "x", "rsplit('-', 1)", "center(6)", "isalpha()", "capitalize()", "rfind('-')", "format(1)"]
        return f"({inner()}.{draw.choice(methods)})"
    if kind == 4:
        index = draw.choice(["0", "-1", "'a'", "5", "none", "'x'", "true"])
        return f"({inner()}[{index}])"
    return draw.choice([f"({inner()} if {inner()} else {inner()})", f"(not {inner()})", f"[{inner()}, {inner()}]", f"(-{inner()})",
                        f"('%s' % {inner()})", f"('{{}}'.format({inner()}))", f"('%5.2f|%r' % ({inner()}, {inner()}))"])


def cases():
    draw = random.Random(20261129)
    for _ in range(400):
        yield random_spacing(draw)
    for _ in range(600):
        yield "{{ " + random_expression(draw, draw.randint(1, 3)) + " }}"
    for line in EXPRESSIONS.replace("'line\\\njoined'", "'line\\\\njoined'").split("\n"):
        for expression in split(line):
            yield "{{ " + expression + " }}"
    yield from TEMPLATES


def split(line):
    """Expressions are separated by a bar with blanks around it."""
    return [part.strip() for part in line.split(" | ")]


def expected(template):
    try:
        return {"template": template, "text": _cached_compile_jinja_template(template).render(**CONTEXT)}
    except Exception as error:
        return {"template": template, "error": f"{type(error).__name__}: {error}"}


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    found = [expected(template) for template in dict.fromkeys(cases())]
    found = [case for case in found if " object at 0x" not in case.get("text", "")]
    (folder / "cases.json").write_text(json.dumps({"context": CONTEXT, "cases": found}, ensure_ascii=False, indent=0) + "\n")
    errors = sum("error" in case for case in found)
    print(f"{len(found)} cases, {errors} of them errors")


if __name__ == "__main__":
    main()
