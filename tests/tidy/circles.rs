//! The rule that no files import each other in a circle: whoever reads one of them would have to read all.
//! A parent module names its children, which may use what it defines; that alone is no circle.

use std::collections::{BTreeMap, BTreeSet, VecDeque, btree_map::Entry};

use crate::{
    all_sources, is_test_file,
    text::{Source, behind_block, body, skip_blanks, word_at, words},
};

/// A module or an item: the crate that it is in, and its path from the root of that.
type Place = (&'static str, Vec<String>);

/// What one file has to do with others.
struct File {
    path: String,
    module: Place,
    source: Source,
    /// The names that its `use` statements bring in; the name `*` for all of a module.
    names: Vec<(String, Place)>,
}

/// A path that is written somewhere, and the name that a `use` gives to its last part.
struct Written {
    at: usize,
    parts: Vec<String>,
    name: String,
}

/// Adds what the use tree (or plain path) at `at` names, each below `prefix`; returns where it ends.
fn tree(code: &str, at: usize, prefix: &[String], out: &mut Vec<Written>) -> usize {
    let at = skip_blanks(code, at);
    if code[at..].starts_with('{') {
        let end = behind_block(code, at);
        let mut i = at + 1;
        while !code[i..end - 1].trim().is_empty() {
            let behind = skip_blanks(code, tree(code, i, prefix, out));
            i = behind + usize::from(behind < end - 1);
        }
        return end;
    }
    let word = if code[at..].starts_with('*') { "*" } else { word_at(code, at) };
    let parts =
        if word == "self" && !prefix.is_empty() { prefix.to_vec() } else { [prefix, &[word.to_owned()]].concat() };
    let end = at + word.len().max(1);
    let next = skip_blanks(code, end.min(code.len()));
    if code[next..].starts_with("::") && !code[skip_blanks(code, next + 2)..].starts_with('<') {
        return tree(code, next + 2, &parts, out);
    }
    let renamed = word_at(code, next) == "as";
    let behind = skip_blanks(code, next + 2 * usize::from(renamed));
    let name = if renamed { word_at(code, behind).to_owned() } else { parts.last().cloned().unwrap_or_default() };
    let end = if renamed { behind + name.len() } else { end };
    out.push(Written { at, parts, name });
    end
}

/// Every `use` statement of a file: where it ends is no business of the caller.
fn uses(code: &str) -> Vec<Written> {
    let mut out = vec![];
    for at in words(code, "use") {
        tree(code, at + 3, &[], &mut out);
    }
    out
}

/// Every path in a file that begins with one of these words.
fn paths_from(code: &str, heads: &[&str]) -> Vec<Written> {
    let mut out = vec![];
    for head in heads {
        for at in words(code, head) {
            let goes_on = code[skip_blanks(code, at + head.len())..].starts_with("::");
            if goes_on && !code[..at].trim_end().ends_with("::") {
                tree(code, at, &[], &mut out);
            }
        }
    }
    out
}

struct House {
    files: Vec<File>,
    by_module: BTreeMap<Place, usize>,
}

impl House {
    fn new(sources: &[Source]) -> Self {
        let wanted = |source: &&Source| source.path.starts_with("src/") && !is_test_file(&source.path);
        let files: Vec<File> = sources
            .iter()
            .filter(wanted)
            .map(|source| {
                let (path, source) = (source.path.clone(), source.without_tests());
                File { module: place_of(&path), path, source, names: vec![] }
            })
            .collect();
        let by_module = files.iter().enumerate().map(|(index, file)| (file.module.clone(), index)).collect();
        let mut house = Self { files, by_module };
        for index in 0..house.files.len() {
            let written = uses(&house.files[index].source.code);
            let names = written.into_iter().filter_map(|w| Some((w.name.clone(), house.place(index, &w)?)));
            house.files[index].names = names.collect();
        }
        house
    }

    /// Where a path that a file writes begins: at the root, around the file, or with one of its children.
    fn place(&self, index: usize, written: &Written) -> Option<Place> {
        let file = &self.files[index];
        let (mut root, mut module) = (file.module.0, around(&file.source.code, file.module.1.clone(), written.at));
        let mut parts = written.parts.as_slice();
        match parts.first()?.as_str() {
            "crate" => (module, parts) = (vec![], &parts[1..]),
            "twistlock_ha" => (root, module, parts) = ("lib", vec![], &parts[1..]),
            "self" => parts = &parts[1..],
            "super" => {}
            head => {
                let child = (root, [module.as_slice(), &[head.to_owned()]].concat());
                self.by_module.get(&child)?;
            }
        }
        while parts.first().is_some_and(|part| part == "super") {
            module.pop();
            parts = &parts[1..];
        }
        module.extend_from_slice(parts);
        Some((root, module))
    }

    /// The files that define what is at a place: behind all that only passes it on.
    fn homes(&self, place: &Place, depth: usize, out: &mut BTreeSet<usize>) {
        let (root, path) = place;
        let known = (0..=path.len()).rev().find_map(|n| Some((self.by_module.get(&(*root, path[..n].to_vec()))?, n)));
        let Some((&index, n)) = known.filter(|_| depth < 8) else { return };
        let Some(item) = path.get(n) else {
            out.insert(index);
            return;
        };
        let file = &self.files[index];
        let mut passed_on = false;
        for (_, target) in file.names.iter().filter(|(name, _)| name == item) {
            let target = (target.0, [target.1.as_slice(), &path[n + 1..]].concat());
            passed_on = target != *place;
            self.homes(&target, depth + 1, out);
        }
        if !passed_on {
            out.insert(index);
        }
    }

    /// Which files each file imports. What a module imports only to name something in it counts as that something.
    fn imports(&self) -> Vec<BTreeSet<usize>> {
        let of_one = |index: usize| {
            let file = &self.files[index];
            let code = &file.source.code;
            let mut places: Vec<Place> = vec![];
            let own = paths_from(code, &["crate", "super", "self", "twistlock_ha"]);
            places.extend(own.iter().filter_map(|written| self.place(index, written)));
            for (name, place) in file.names.iter().filter(|(_, place)| self.by_module.contains_key(place)) {
                let through = paths_from(code, &[name]);
                if !through.is_empty() {
                    places.retain(|other| other != place);
                }
                let below = |written: &Written| (place.0, [place.1.as_slice(), &written.parts[1..]].concat());
                places.extend(through.iter().map(below));
            }
            let mut homes = BTreeSet::new();
            places.iter().for_each(|place| self.homes(place, 0, &mut homes));
            homes.retain(|home| *home != index && !self.is_child(*home, index));
            homes
        };
        (0..self.files.len()).map(of_one).collect()
    }

    fn is_child(&self, child: usize, parent: usize) -> bool {
        let ((root, child), (same, parent)) = (&self.files[child].module, &self.files[parent].module);
        root == same && child.len() == parent.len() + 1 && child.starts_with(parent)
    }

    /// The shortest way from a file back to itself.
    fn circle_of(&self, start: usize, imports: &[BTreeSet<usize>]) -> Option<Vec<usize>> {
        let mut from = BTreeMap::new();
        let mut ends = VecDeque::from([start]);
        while let Some(at) = ends.pop_front() {
            for &next in &imports[at] {
                if next == start {
                    let mut way = vec![start];
                    let mut step = at;
                    while step != start {
                        way.push(step);
                        step = from[&step];
                    }
                    way.push(start);
                    way.reverse();
                    return Some(way);
                }
                if let Entry::Vacant(entry) = from.entry(next) {
                    entry.insert(at);
                    ends.push_back(next);
                }
            }
        }
        None
    }

    fn name(&self, way: &[usize]) -> String {
        way.iter().map(|index| self.files[*index].path.as_str()).collect::<Vec<_>>().join(" -> ")
    }

    /// Every file that is in a circle, with the shortest one.
    fn circles(&self) -> BTreeMap<&str, String> {
        let imports = self.imports();
        let all = (0..self.files.len()).filter_map(|index| Some((index, self.circle_of(index, &imports)?)));
        all.map(|(index, way)| (self.files[index].path.as_str(), self.name(&way))).collect()
    }
}

/// The module that a file is.
fn place_of(path: &str) -> Place {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    let parts: Vec<String> = inner.split('/').map(str::to_owned).collect();
    match parts[0].as_str() {
        "lib" => ("lib", vec![]),
        "main" => ("twistlockd", vec![]),
        "bin" if parts[1] == "defender" => ("defender", vec![]),
        "bin" => ("twistcli", vec![]),
        _ if crate::program(path) => ("twistlockd", parts),
        _ => ("lib", parts),
    }
}

/// The module around a position of a file, inline modules included.
fn around(code: &str, mut module: Vec<String>, position: usize) -> Vec<String> {
    for at in words(code, "mod").take_while(|at| *at < position) {
        if body(code, at).is_some_and(|open| (open..behind_block(code, open)).contains(&position)) {
            module.push(word_at(code, skip_blanks(code, at + 3)).to_owned());
        }
    }
    module
}

/// The first circle, file by file.
fn finding(sources: &[Source]) -> Option<String> {
    House::new(sources).circles().values().next().map(|way| format!("a circle of imports: {way}"))
}

#[test]
fn files_do_not_import_each_other_in_a_circle() {
    assert_eq!(finding(&all_sources()), None);
}

#[test]
fn a_circle_is_found_and_named() {
    let house = |files: &[(&str, &str)]| files.iter().map(|(path, raw)| Source::new(path, raw)).collect::<Vec<_>>();
    let of = |files: &[(&str, &str)]| finding(&house(files)).unwrap_or_default();
    let named = "a circle of imports: src/a/b.rs -> src/a/c.rs -> src/a/b.rs";
    let b = ("src/a/b.rs", "use super::c::C;");
    // However the other one is reached: by its path, through its parent, or with the help of its name.
    for c in [
        "use crate::a::b::B;",
        "use super::{d::D, b::{self, B}};",
        "fn f() -> super::B { super::B }",
        "use super::b as other; fn f() { other::g() }",
        "use crate::a; fn f() { a::B::new() }",
    ] {
        assert_eq!(of(&[("src/a/mod.rs", "mod b; mod c; pub use b::B;"), b, ("src/a/c.rs", c)]), named, "{c}");
    }
    let long = [("src/a/mod.rs", "pub use c::C;"), b, ("src/a/c.rs", "use super::d;"), ("src/a/d.rs", "use super::b;")];
    assert_eq!(of(&long), "a circle of imports: src/a/b.rs -> src/a/c.rs -> src/a/d.rs -> src/a/b.rs");
    // A program has modules of its own.
    let program = [("src/daemon.rs", "use crate::joining::J;"), ("src/joining.rs", "use crate::daemon::D;")];
    assert_eq!(of(&program), "a circle of imports: src/daemon.rs -> src/joining.rs -> src/daemon.rs");
    // A parent names its children, and tests may use whatever they like.
    assert_eq!(of(&[("src/a/mod.rs", "mod b; use self::b::B;"), ("src/a/b.rs", "use super::A;")]), "");
    let tests = "#[cfg(test)] mod tests { use super::super::b::B; }";
    assert_eq!(of(&[("src/a/mod.rs", ""), b, ("src/a/c.rs", tests)]), "");
    assert_eq!(of(&[("src/a/mod.rs", ""), b, ("src/a/c.rs", "// super::b::B\nuse std::b::B;")]), "");
}
