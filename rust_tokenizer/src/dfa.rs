//! Split patterns as deterministic automata, which take one step per byte whatever the pattern.
//!
//! An automaton supports neither possessive repetition nor look-ahead. Split patterns use both, but mostly in two ways
//! that can be expressed without them: a possessive repetition that would not give anything back anyway, and
//! `\s+(?!\S)` as an alternative. Other patterns are left to the backtracking regex engine.

use regex_automata::dfa::{Automaton, StartKind, dense};
use regex_automata::nfa::thompson::{self, WhichCaptures};
use regex_automata::util::primitives::StateID;
use regex_automata::{Anchored, MatchKind};
use regex_syntax::ast::{Ast, Flag, FlagsItemKind, GroupKind, RepetitionKind, Visitor, visit};
use regex_syntax::hir::translate::Translator;
use regex_syntax::hir::{Class, ClassUnicode, ClassUnicodeRange, Hir, HirKind, Look};

/// The size limit of an automaton in bytes. Larger ones are worth neither the half second to build them nor the cache
/// they take. The published patterns need at most 3 MB and 35 ms.
const LARGEST: usize = 8 << 20;

/// Finds the matches of a pattern.
#[derive(Debug)]
pub struct Dfa {
    stages: Vec<Stage>,
}

/// Consecutive alternatives of a pattern. The next stage is tried where none of these matches.
#[derive(Debug)]
struct Stage {
    automaton: dense::DFA<Vec<u32>>,
    start: StateID,
    /// The index of the last alternative if it is a run of a class followed by `(?!...)` of all other characters.
    /// The automaton matches the whole run. The character after a run is never in the class, so the run has to give
    /// back its last character unless it ends the text.
    run: Option<usize>,
}

/// An alternative of a pattern.
struct Alternative {
    hir: Hir,
    is_run: bool,
}

impl Dfa {
    /// None if the pattern needs more than an automaton. The pattern must compile as a regex.
    pub fn new(pattern: &str) -> Option<Self> {
        let alternatives: Option<Vec<Alternative>> =
            split_alternatives(pattern)?.into_iter().map(alternative).collect();
        let alternatives = alternatives?;
        let stages: Option<Vec<Stage>> =
            alternatives.split_inclusive(|alternative| alternative.is_run).map(Stage::new).collect();
        Some(Self { stages: stages? })
    }

    /// The end of the match that starts at `at`; None if there is none.
    #[inline]
    pub fn match_at(&self, text: &str, at: usize) -> Option<usize> {
        self.stages.iter().find_map(|stage| stage.match_at(text, at))
    }
}

impl Stage {
    fn new(alternatives: &[Alternative]) -> Option<Self> {
        let hirs: Vec<&Hir> = alternatives.iter().map(|alternative| &alternative.hir).collect();
        let config = thompson::Config::new().which_captures(WhichCaptures::None);
        let nfa = thompson::Compiler::new().configure(config).build_many_from_hir(&hirs).ok()?;
        let config = dense::Config::new()
            .start_kind(StartKind::Anchored)
            .match_kind(MatchKind::LeftmostFirst)
            .accelerate(false)
            .dfa_size_limit(Some(LARGEST))
            .determinize_size_limit(Some(LARGEST));
        let automaton = dense::Builder::new().configure(config).build_from_nfa(&nfa).ok()?;
        let start = automaton.universal_start_state(Anchored::Yes)?;
        let run = alternatives.last()?.is_run.then_some(alternatives.len() - 1);
        Some(Self { automaton, start, run })
    }

    #[inline]
    fn match_at(&self, text: &str, at: usize) -> Option<usize> {
        let mut state = self.start;
        let mut found = None;
        let mut end = at;
        loop {
            let byte = text.as_bytes().get(end);
            state = match byte {
                Some(&byte) => self.automaton.next_state(state, byte),
                None => self.automaton.next_eoi_state(state),
            };
            if self.automaton.is_special_state(state) {
                if self.automaton.is_match_state(state) {
                    // A match state means that the bytes before the current one match.
                    found = Some((self.automaton.match_pattern(state, 0).as_usize(), end));
                } else if self.automaton.is_dead_state(state) {
                    break;
                }
            }
            if byte.is_none() {
                break;
            }
            end += 1;
        }
        let (alternative, end) = found?;
        if Some(alternative) == self.run && end < text.len() {
            let last = text[at..end].chars().next_back()?;
            return Some(end - last.len_utf8()).filter(|&end| end > at);
        }
        Some(end)
    }
}

/// The parts between the top-level `|`. None if parentheses are unbalanced.
fn split_alternatives(pattern: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    let (mut start, mut groups, mut classes) = (0, 0u32, 0u32);
    let mut characters = pattern.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => _ = characters.next(),
            '[' => {
                classes += 1;
                // A `]` at the start of a class does not end it.
                characters.next_if(|&(_, next)| next == '^');
                characters.next_if(|&(_, next)| next == ']');
            }
            ']' if classes > 0 => classes -= 1,
            '(' if classes == 0 => groups += 1,
            ')' if classes == 0 => groups = groups.checked_sub(1)?,
            '|' if classes == 0 && groups == 0 => {
                parts.push(&pattern[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&pattern[start..]);
    Some(parts)
}

fn alternative(text: &str) -> Option<Alternative> {
    if let Some((run, behind)) = text.strip_suffix(')').and_then(|text| text.rsplit_once("(?!")) {
        let mut others = class(&parse(behind)?)?;
        others.negate();
        let hir = parse(run)?;
        let HirKind::Repetition(repetition) = hir.kind() else { return None };
        let is_run = repetition.min == 1 && repetition.max.is_none() && repetition.greedy;
        return (is_run && class(&repetition.sub)? == others).then_some(Alternative { hir, is_run });
    }
    let hir = parse(&without_possessives(text)?)?;
    let properties = hir.properties();
    let only_end = properties.look_set().iter().all(|look| look == Look::End);
    // An empty match is not a piece, and continuing after one would need special care.
    (only_end && properties.minimum_len()? > 0).then_some(Alternative { hir, is_run: false })
}

fn parse(text: &str) -> Option<Hir> {
    let ast = regex_syntax::ast::parse::Parser::new().parse(text).ok()?;
    visit(&ast, OnlyPlain).ok()?;
    Translator::new().translate(text, &ast).ok()
}

/// Rejects what the two engines read differently: flags other than `i` and `s`, and a repetition of a repetition, which
/// one engine takes to be possessive and the other does not.
struct OnlyPlain;

impl Visitor for OnlyPlain {
    type Output = ();
    type Err = ();

    fn finish(self) -> Result<(), ()> {
        Ok(())
    }

    fn visit_pre(&mut self, ast: &Ast) -> Result<(), ()> {
        match ast {
            Ast::Flags(_) => Err(()),
            Ast::Repetition(repetition) if matches!(*repetition.ast, Ast::Repetition(_)) => Err(()),
            Ast::Group(group) => match &group.kind {
                GroupKind::NonCapturing(flags) if flags.items.iter().any(|item| !is_plain(&item.kind)) => Err(()),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

fn is_plain(flag: &FlagsItemKind) -> bool {
    matches!(flag, FlagsItemKind::Negation | FlagsItemKind::Flag(Flag::CaseInsensitive | Flag::DotMatchesNewLine))
}

/// The alternative with its possessive repetitions made greedy. None if that could change what it matches.
fn without_possessives(text: &str) -> Option<String> {
    let ast = regex_syntax::ast::parse::Parser::new().parse(text).ok()?;
    let items = match &ast {
        Ast::Concat(concat) => &concat.asts[..],
        single => std::slice::from_ref(single),
    };
    let mut plain = String::new();
    // From last to first, so that what follows an item is known when the item is checked.
    for item in items.iter().rev() {
        let span = item.span();
        let mut end = span.end.offset;
        if let Ast::Repetition(outer) = item
            && let Ast::Repetition(inner) = &*outer.ast
        {
            if !(outer.greedy && inner.greedy && matches!(outer.op.kind, RepetitionKind::OneOrMore)) {
                return None;
            }
            let body = inner.ast.span();
            let given_back = class(&parse(&text[body.start.offset..body.end.offset])?)?;
            // Giving something back could help only if what follows can begin with it, and cannot be empty anyway.
            let follows = parse(&plain)?;
            let always = follows.properties().minimum_len() == Some(0) && follows.properties().look_set().is_empty();
            let mut common = first(&follows)?;
            common.intersect(&given_back);
            if !always && !common.ranges().is_empty() {
                return None;
            }
            end = outer.op.span.start.offset;
        }
        plain.insert_str(0, &text[span.start.offset..end]);
    }
    Some(plain)
}

/// The characters that an expression matches if it always matches exactly one character.
fn class(hir: &Hir) -> Option<ClassUnicode> {
    match hir.kind() {
        HirKind::Class(Class::Unicode(class)) => Some(class.clone()),
        HirKind::Literal(literal) => {
            let mut characters = std::str::from_utf8(&literal.0).ok()?.chars();
            let only = characters.next().filter(|_| characters.next().is_none())?;
            Some(ClassUnicode::new([ClassUnicodeRange::new(only, only)]))
        }
        _ => None,
    }
}

/// The characters with which a match can begin. None if that depends on its surroundings, other than the end of text.
fn first(hir: &Hir) -> Option<ClassUnicode> {
    let mut union = ClassUnicode::empty();
    match hir.kind() {
        HirKind::Empty | HirKind::Look(Look::End) => {}
        HirKind::Look(_) | HirKind::Class(Class::Bytes(_)) => return None,
        HirKind::Literal(literal) => {
            let character = std::str::from_utf8(&literal.0).ok()?.chars().next()?;
            union.push(ClassUnicodeRange::new(character, character));
        }
        HirKind::Class(Class::Unicode(class)) => union = class.clone(),
        HirKind::Repetition(repetition) => union = first(&repetition.sub)?,
        HirKind::Capture(capture) => union = first(&capture.sub)?,
        HirKind::Alternation(alternatives) => {
            for alternative in alternatives {
                union.union(&first(alternative)?);
            }
        }
        HirKind::Concat(parts) => {
            for part in parts {
                union.union(&first(part)?);
                if part.properties().minimum_len() != Some(0) {
                    break;
                }
            }
        }
    }
    Some(union)
}

#[cfg(test)]
pub(crate) mod tests {
    use fancy_regex::Regex;
    use proptest::prelude::*;

    use super::*;
    use crate::split::DEFAULT_PATTERN;

    const GPT2: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s";
    const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
    const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const OTHERS: [&str; 8] = [
        r"\p{L}+|\s+(?!\S)",
        r"[a-z|(\]]+|.",
        r"[]x-]++|[^]x]",
        r"(a|b(c|d)*)+?e|a",
        r"x?+y|x|\s+(?!\S)|\s+(?!\S)|\s+",
        r"[ab]+(?![^ab])|[ab]c",
        r"(?i:k)+|(?s:.)x?+",
        r"a{2,3}+b|a$|aa",
    ];
    const NOT: [&str; 12] = [
        r"(?i)a|b",
        r"a|",
        r"a*",
        r"(a|b)\1",
        r"(?<=a)b|a",
        r"a++a|a",
        r"(?:a++)b",
        r"\s+(?!\s)|\s",
        r"\s++(?!\S)|\s",
        r"\bx+|.",
        r"(?m:^a)|a",
        r"(?x: a | b )c",
    ];

    pub(crate) fn all() -> impl Iterator<Item = &'static str> {
        [DEFAULT_PATTERN, GPT2, CL100K, O200K].into_iter().chain(OTHERS)
    }

    /// The end of the regex engine's match that starts exactly at `at`.
    fn anchored(regex: &Regex, text: &str, at: usize) -> Option<usize> {
        let found = regex.find_from_pos(text, at).unwrap()?;
        (found.start() == at).then_some(found.end())
    }

    fn check(pattern: &str, text: &str) {
        let (dfa, regex) = (Dfa::new(pattern).unwrap(), Regex::new(pattern).unwrap());
        for (at, _) in text.char_indices() {
            assert_eq!(dfa.match_at(text, at), anchored(&regex, text, at), "{pattern} in {text:?} at {at}");
        }
    }

    #[test]
    fn published_patterns_become_automata() {
        for pattern in all() {
            assert!(Dfa::new(pattern).is_some(), "{pattern}");
            Regex::new(pattern).unwrap();
        }
    }

    #[test]
    fn patterns_beyond_an_automaton_are_rejected() {
        for pattern in NOT {
            assert!(Dfa::new(pattern).is_none(), "{pattern}");
            Regex::new(pattern).unwrap();
        }
    }

    #[test]
    fn known_matches() {
        check(CL100K, "It'S 12345 = 3 \r\n\n  x\t ");
        check(O200K, "HelloWorld's DON'T 日本語 é\u{301}/\n\n  ");
        check(OTHERS[4], "yxyx   x  ");
        check(OTHERS[7], "aaab aab a");
    }

    /// Short patterns in which repetitions interact with what follows them.
    fn any_pattern() -> impl Strategy<Value = String> {
        let class =
            prop::sample::select(vec!["a", "b", "[ab]", "[^a]", r"\s", r"\S", r"\p{L}", ".", "(?i:b|ab)", "(a|bc)"]);
        let repetition = prop::sample::select(vec!["", "", "?", "*", "+", "?+", "*+", "++", "+?", "{1,2}", "{1,2}+"]);
        let part = (class, repetition).prop_map(|(class, repetition)| format!("{class}{repetition}"));
        let alternative = prop_oneof![
            8 => prop::collection::vec(part, 1..4).prop_map(|parts| parts.concat()),
            1 => Just(r"\s+(?!\S)".to_owned()),
            1 => Just(r"[ab]+(?![^ab])".to_owned()),
            1 => Just(r"[ab]++$".to_owned()),
        ];
        prop::collection::vec(alternative, 1..5).prop_map(|alternatives| alternatives.join("|"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn any_pattern_with_an_automaton(pattern in any_pattern(), text in "[abBc \\né]{0,12}") {
            let Ok(regex) = Regex::new(&pattern) else { return Ok(()) };
            if let Some(dfa) = Dfa::new(&pattern) {
                for (at, _) in text.char_indices() {
                    prop_assert_eq!(dfa.match_at(&text, at), anchored(&regex, &text, at), "{} at {}", pattern, at);
                }
            }
        }
    }
}
