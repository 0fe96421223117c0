//! Learning byte-pair merges from the counts of pieces.
//!
//! There is no map from pairs to their counts. Every place in the text stores the index of the pair that begins there.
//! The pairs that a merge creates all contain the new symbol, so that during the merge their other symbol identifies
//! them. No later merge creates them again: once a merge is done, all places of the pairs it created are known.

use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::{BinaryHeap, HashMap};

use crate::count::PieceCounts;
use crate::error::Error;

/// Marks the boundary between two pieces in the arena; not a symbol.
const BORDER: u32 = u32::MAX;
/// The index of a pair that does not exist, stored at places where no pair begins.
const NONE: u32 = u32::MAX;
/// Stands for the weight of a place if its piece occurs too often for 32 bits.
const HEAVY: u32 = u32::MAX;
const BYTES: usize = 256;
/// The number of places examined together.
const BLOCK: usize = 256;

/// A byte of a piece. What a merge reads is stored together, because merging is bound by memory latency.
#[derive(Clone, Copy)]
struct Place {
    /// The symbol that starts or ends with this byte. Meaningless inside a symbol.
    symbol: u32,
    /// The index of the pair whose first symbol starts here.
    pair: u32,
    /// How often the piece occurs.
    weight: u32,
}

/// All distinct pieces, concatenated.
struct Arena {
    places: Vec<Place>,
    /// The weights of the places that are `HEAVY`.
    heavy: HashMap<u32, u64>,
}

impl Arena {
    fn new(counts: &PieceCounts) -> Result<Self, Error> {
        let mut size = 1usize;
        counts.for_each(|piece, _| size += piece.len() + 1);
        if size >= NONE as usize {
            return Err(Error::TooLarge);
        }
        let border = Place { symbol: BORDER, pair: NONE, weight: 0 };
        let mut arena = Self { places: Vec::with_capacity(size), heavy: HashMap::new() };
        arena.places.push(border);
        counts.for_each(|piece, count| {
            let weight = u32::try_from(count).unwrap_or(HEAVY);
            if weight == HEAVY {
                let start = arena.places.len();
                arena.heavy.extend((start..start + piece.len()).map(|place| (place as u32, count)));
            }
            arena.places.extend(piece.iter().map(|&byte| Place { symbol: byte.into(), pair: NONE, weight }));
            arena.places.push(border);
        });
        Ok(arena)
    }

    fn weight(&self, place: usize) -> u64 {
        match self.places[place].weight {
            HEAVY => self.heavy[&(place as u32)],
            weight => weight.into(),
        }
    }
}

/// A pair in the heap: its count, ids and index.
type Candidate = (u64, Reverse<(u32, u32)>, u32);

/// Pairs of neighbouring symbols by index.
#[derive(Default)]
struct Pairs {
    counts: Vec<u64>,
    /// Where the places of each pair end in `places`; they start where those of the previous pair end.
    ends: Vec<usize>,
    /// Where each pair began when it was created, in ascending order. Places that have lost it since are skipped later.
    places: Vec<u32>,
    /// Highest count first, then lowest pair of ids. A count in the heap may be out of date, but is never too low.
    heap: BinaryHeap<Candidate>,
    /// The ids of the pairs that the current merge creates, which have the highest indices; the number of places of
    /// each; and the places themselves, each with the index of its pair.
    created: Vec<(u32, u32)>,
    sizes: Vec<usize>,
    begun: Vec<(u32, u32)>,
}

impl Pairs {
    /// The pairs of bytes.
    fn new(arena: &mut Arena) -> Self {
        let mut pairs = Self::default();
        let mut table = vec![NONE; BYTES * BYTES];
        for place in 1..arena.places.len() {
            let (left, right) = (arena.places[place - 1].symbol, arena.places[place].symbol);
            if left != BORDER && right != BORDER {
                let slot = &mut table[left as usize * BYTES + right as usize];
                pairs.begin(arena, place - 1, arena.weight(place - 1), slot, (left, right));
            }
        }
        pairs.close();
        pairs
    }

    /// Records that a pair begins at a place. `slot` holds the pair's index, or receives one if it is new.
    #[inline(always)]
    fn begin(&mut self, arena: &mut Arena, place: usize, weight: u64, slot: &mut u32, ids: (u32, u32)) {
        if *slot == NONE {
            *slot = self.counts.len() as u32;
            self.counts.push(0);
            self.created.push(ids);
            self.sizes.push(0);
        }
        let first = self.counts.len() - self.created.len();
        self.counts[*slot as usize] += weight;
        self.sizes[*slot as usize - first] += 1;
        self.begun.push((*slot, place as u32));
        arena.places[place].pair = *slot;
    }

    /// Ends a merge: stores the places of the pairs it created, and makes these pairs candidates.
    fn close(&mut self) {
        let first = self.counts.len() - self.created.len();
        let mut end = self.places.len();
        self.places.resize(end + self.begun.len(), 0);
        for (index, (ids, size)) in self.created.drain(..).zip(&mut self.sizes).enumerate() {
            self.heap.push((self.counts[first + index], Reverse(ids), (first + index) as u32));
            // From here on, `size` is where the next place of this pair is stored.
            let start = end;
            end += *size;
            *size = start;
        }
        for (index, place) in self.begun.drain(..) {
            let next = &mut self.sizes[index as usize - first];
            self.places[*next] = place;
            *next += 1;
        }
        self.ends.append(&mut self.sizes);
    }

    /// The most frequent pair, the lowest ids in a tie, and its index. None when no pair is left.
    fn pop(&mut self) -> Option<((u32, u32), u32)> {
        while let Some(mut top) = self.heap.peek_mut() {
            let (count, Reverse(ids), index) = *top;
            let current = self.counts[index as usize];
            if current == 0 {
                PeekMut::pop(top);
            } else if current < count {
                top.0 = current;
            } else {
                PeekMut::pop(top);
                return Some((ids, index));
            }
        }
        None
    }

    /// The range of a pair's places in `places`.
    fn range(&self, index: u32) -> std::ops::Range<usize> {
        let index = index as usize;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        start..self.ends[index]
    }
}

/// Learns the tokens of a vocabulary of `size` (at least 256): the 256 bytes, then the merges in the order in which
/// they were made. Each step merges the most frequent pair of neighbours, the lowest (left id, right id) in a tie, from
/// left to right in every piece. A pair that would make a token of more than `longest` bytes is passed over. Returns
/// fewer tokens when no pair is left to merge.
///
/// `interrupted` is called from time to time with the number of tokens so far; if it returns true, training ends with
/// `Error::Interrupted`.
pub fn learn(
    counts: &PieceCounts,
    size: usize,
    longest: usize,
    mut interrupted: impl FnMut(usize) -> bool,
) -> Result<Vec<Vec<u8>>, Error> {
    let mut arena = Arena::new(counts)?;
    let mut pairs = Pairs::new(&mut arena);
    let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    let mut sizes = vec![1; BYTES];
    // During a merge, the indices of the pairs (symbol, new symbol) and (new symbol, symbol).
    let (mut before_new, mut after_new) = (vec![NONE; BYTES], vec![NONE; BYTES]);
    while tokens.len() < size {
        if tokens.len().is_multiple_of(256) && interrupted(tokens.len()) {
            return Err(Error::Interrupted);
        }
        let Some(((left, right), index)) = pairs.pop() else { break };
        let (left_size, right_size) = (sizes[left as usize], sizes[right as usize]);
        if left_size + right_size > longest {
            continue;
        }
        let merged = tokens.len() as u32;
        tokens.push([&tokens[left as usize][..], &tokens[right as usize][..]].concat());
        sizes.push(left_size + right_size);
        before_new.push(NONE);
        after_new.push(NONE);
        let mut rest = pairs.range(index);
        while !rest.is_empty() {
            // First drop the places of a block that have lost the pair. This takes no branches, so that many memory
            // accesses are in flight at once.
            let block = rest.start..rest.end.min(rest.start + BLOCK);
            rest.start = block.end;
            let mut present = [0; BLOCK];
            let mut number = 0;
            for &place in &pairs.places[block] {
                present[number] = place;
                number += usize::from(arena.places[place as usize].pair == index);
            }
            for &at in &present[..number] {
                let at = at as usize;
                // In `aaa`, the second `aa` is gone once the first has been merged.
                if arena.places[at].pair != index {
                    continue;
                }
                let weight = arena.weight(at);
                let second = at + left_size;
                let after = second + right_size;
                let (previous, next) = (arena.places[at - 1].symbol, arena.places[after].symbol);
                arena.places[at].symbol = merged;
                arena.places[at].pair = NONE;
                arena.places[after - 1].symbol = merged;
                if previous != BORDER {
                    let start = at - sizes[previous as usize];
                    pairs.counts[arena.places[start].pair as usize] -= weight;
                    pairs.begin(&mut arena, start, weight, &mut before_new[previous as usize], (previous, merged));
                }
                if next != BORDER {
                    pairs.counts[arena.places[second].pair as usize] -= weight;
                    pairs.begin(&mut arena, at, weight, &mut after_new[next as usize], (merged, next));
                }
                arena.places[second].pair = NONE;
            }
        }
        pairs.counts[index as usize] = 0;
        for &(left, right) in &pairs.created {
            before_new[left as usize] = NONE;
            after_new[right as usize] = NONE;
        }
        pairs.close();
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::count::Counter;
    use crate::split::{DEFAULT_PATTERN, Splitter};

    fn learn_from(texts: &[&str], pattern: &str, size: usize) -> Vec<Vec<u8>> {
        learn_up_to(usize::MAX, texts, pattern, size)
    }

    fn learn_up_to(longest: usize, texts: &[&str], pattern: &str, size: usize) -> Vec<Vec<u8>> {
        let splitter = Splitter::new(pattern).unwrap();
        let mut counts = Counter::default();
        for text in texts {
            counts.add_text(&splitter, text).unwrap();
        }
        learn(&counts.finish(), size, longest, |_| false).unwrap()
    }

    /// Training that recounts all pairs for each merge.
    fn reference(longest: usize, texts: &[&str], pattern: &str, size: usize) -> Vec<Vec<u8>> {
        let splitter = Splitter::new(pattern).unwrap();
        let mut pieces: Vec<Vec<u32>> = Vec::new();
        for text in texts {
            splitter.split(text, |start, end| pieces.push(text[start..end].bytes().map(u32::from).collect())).unwrap();
        }
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        while tokens.len() < size {
            let mut counts: BTreeMap<(u32, u32), u64> = BTreeMap::new();
            for pair in pieces.iter().flat_map(|piece| piece.windows(2)) {
                *counts.entry((pair[0], pair[1])).or_insert(0) += 1;
            }
            counts.retain(|&(left, right), _| tokens[left as usize].len() + tokens[right as usize].len() <= longest);
            let Some((&(left, right), _)) = counts.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else {
                break;
            };
            let merged = tokens.len() as u32;
            tokens.push([tokens[left as usize].clone(), tokens[right as usize].clone()].concat());
            for piece in &mut pieces {
                let mut at = 0;
                while at + 1 < piece.len() {
                    if piece[at] == left && piece[at + 1] == right {
                        piece.splice(at..at + 2, [merged]);
                    }
                    at += 1;
                }
            }
        }
        tokens
    }

    #[test]
    fn ties_go_to_the_lowest_pair() {
        assert_eq!(learn_from(&["cd ab cd ab"], "[a-z]+", 258)[256..], [b"ab".to_vec(), b"cd".to_vec()]);
    }

    #[test]
    fn ends_when_nothing_is_left() {
        assert_eq!(learn_from(&["aaa"], "[a-z]+", 999).len(), 258);
        assert_eq!(learn_from(&[""], "[a-z]+", 999).len(), 256);
    }

    #[test]
    fn stops_when_interrupted() {
        assert_eq!(learn(&PieceCounts::default(), 999, 9, |_| true), Err(Error::Interrupted));
    }

    #[test]
    fn no_token_is_longer_than_the_limit() {
        let tokens = learn_up_to(5, &["aaaaaaaaaaaaaaaaaaaaaaaa"], "[a-z]+", 999);
        let sizes: Vec<usize> = tokens[256..].iter().map(Vec::len).collect();
        assert_eq!(sizes, [2, 4]);
        assert_eq!(learn_up_to(6, &["aaaaaaaaaaaaaaaaaaaaaa"], "[a-z]+", 999).last().unwrap().len(), 6);
    }

    #[test]
    fn a_long_piece_takes_no_quadratic_time() {
        let mut state = 1u64;
        let letters = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from(b'a' + (state >> 59) as u8 % 26)
        });
        let text: String = letters.take(300_000).collect();
        assert_eq!(learn_from(&[&text], DEFAULT_PATTERN, 4096).len(), 4096);
    }

    proptest! {
        #[test]
        fn equals_the_reference(
            texts in prop::collection::vec("[abc \\né]{0,80}", 1..5),
            merges in 0usize..60,
            longest in 1usize..12,
        ) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            for pattern in [DEFAULT_PATTERN, "(?s).+"] {
                for longest in [longest, usize::MAX] {
                    prop_assert_eq!(
                        learn_up_to(longest, &texts, pattern, 256 + merges),
                        reference(longest, &texts, pattern, 256 + merges)
                    );
                }
            }
        }
    }
}
