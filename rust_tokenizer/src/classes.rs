//! The Unicode character classes that the default split pattern distinguishes.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

/// The class of a character in the default split pattern. Every character has exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `[^\s\p{L}\p{N}]`
    Other,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s` except `\r` and `\n`
    Space,
    /// `\r` or `\n`
    Newline,
}

/// The class of each ASCII byte; None for bytes of multi-byte characters. Most text needs no other table.
const ASCII: [Option<Kind>; 256] = {
    let mut table = [None; 256];
    let mut byte = 0;
    while byte < 0x80 {
        table[byte as usize] = Some(match byte {
            b'a'..=b'z' | b'A'..=b'Z' => Kind::Letter,
            b'0'..=b'9' => Kind::Number,
            b'\r' | b'\n' => Kind::Newline,
            b'\t' | b' ' | 0x0B | 0x0C => Kind::Space,
            _ => Kind::Other,
        });
        byte += 1;
    }
    table
};

/// The class of each code point. The ranges come from `regex-syntax`, which the regex engines use too, so that the
/// scanner and the regex always follow the same version of Unicode. It takes 1.1 MB, of which text touches a few pages.
static TABLE: LazyLock<Vec<Kind>> = LazyLock::new(|| {
    let mut table = vec![Kind::Other; char::MAX as usize + 1];
    for (pattern, kind) in [(r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number), (r"\s", Kind::Space)] {
        for (start, end) in ranges(pattern) {
            table[start as usize..=end as usize].fill(kind);
        }
    }
    table[usize::from(b'\r')] = Kind::Newline;
    table[usize::from(b'\n')] = Kind::Newline;
    table
});

/// The inclusive ranges of code points that a one-character pattern matches.
fn ranges(pattern: &str) -> Vec<(char, char)> {
    let hir = regex_syntax::parse(pattern).expect("the pattern is a constant");
    match hir.into_kind() {
        HirKind::Class(Class::Unicode(class)) => class.iter().map(|range| (range.start(), range.end())).collect(),
        _ => Vec::new(),
    }
}

/// A handle to the table, taken once per text so that looking up a character is a plain index.
#[derive(Clone, Copy)]
pub struct Classes(&'static [Kind]);

impl Classes {
    pub fn load() -> Self {
        Self(&TABLE)
    }

    pub fn of(self, character: char) -> Kind {
        self.0[character as usize]
    }

    /// The class of the character that starts at byte `at`, and the byte offset of the next character.
    /// None at the end of the text.
    #[inline(always)]
    pub fn next(self, text: &str, at: usize) -> Option<(Kind, usize)> {
        let byte = *text.as_bytes().get(at)?;
        if let Some(kind) = ASCII[usize::from(byte)] {
            return Some((kind, at + 1));
        }
        let character = text[at..].chars().next()?;
        Some((self.of(character), at + character.len_utf8()))
    }

    /// The end of the run of characters of class `kind` that starts at `at`.
    #[inline(always)]
    pub fn run(self, text: &str, mut at: usize, kind: Kind) -> usize {
        let bytes = text.as_bytes();
        loop {
            while bytes.get(at).is_some_and(|&byte| ASCII[usize::from(byte)] == Some(kind)) {
                at += 1;
            }
            match self.next(text, at) {
                Some((found, next)) if found == kind => at = next,
                _ => return at,
            }
        }
    }
}
