//! The rules of selectability, case by case.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

/// `s`: selectable, `r`: selectable for restore.
fn component(path: &str, flags: &str) -> Component {
    let (logical_path, name) = path.rsplit_once('/').unwrap_or(("", path));
    let mut component = Component::database(logical_path, name);
    component.selectable = flags.contains('s');
    component.selectable_for_restore = flags.contains('r');
    component
}

/// A server with two databases, one of which has two parts, and its settings.
fn server() -> Vec<Component> {
    vec![
        component("server", "s"),
        component("server/orders", "s"),
        component("server/orders/today", "r"),
        component("server/orders/history", ""),
        component("server/people", ""),
        component("settings", ""),
        component("servers", "s"),
    ]
}

fn name(path: &str) -> Name {
    let (logical_path, name) = path.rsplit_once('/').unwrap_or(("", path));
    (logical_path.to_owned(), name.to_owned())
}

fn picked(path: &str) -> SelectedComponent {
    let (logical_path, name) = name(path);
    SelectedComponent {
        logical_path,
        name,
        previous_stamp: None,
    }
}

fn comes_with(component: &str, with: &str) -> ComesWith {
    ComesWith {
        component: component.to_owned(),
        with: with.to_owned(),
    }
}

#[test]
fn what_has_a_selectable_one_above_it_is_not_picked_and_what_has_none_always_is() {
    let pick = |paths: &[&str]| {
        let components: Vec<_> = paths.iter().map(|path| picked(path)).collect();
        must_come(&server(), &components.iter().collect::<Vec<_>>())
    };
    assert_eq!(pick(&["server/orders"]), Ok(vec![picked("settings")]));
    assert_eq!(pick(&["settings"]), Ok(vec![]), "it may be named");
    assert_eq!(
        pick(&["servers", "server/people"]),
        Err(comes_with("server/people", "server"))
    );
    assert_eq!(
        pick(&["server/orders/today"]),
        Err(comes_with("server/orders/today", "server/orders")),
        "the nearest"
    );
    assert_eq!(
        pick(&["nothing/there"]),
        Ok(vec![picked("settings")]),
        "its writer says that it is not there"
    );
}

#[test]
fn a_name_that_only_begins_alike_stands_below_nothing() {
    assert!(stands_below(&component("a/b/c", ""), "a"));
    assert!(stands_below(&component("a/b/c", ""), "a/b"));
    assert!(!stands_below(&component("ab/c", ""), "a"));
    assert!(!stands_below(&component("a", ""), "a"));
}

#[test]
fn what_merely_comes_along_stands_for_nothing_in_a_whole_backup() {
    let server = server();
    let names: Vec<_> = all(&server).map(whole).collect();
    assert_eq!(names, ["server", "server/orders", "settings", "servers"]);
}

#[test]
fn a_part_is_restored_alone_only_where_its_writer_can() {
    let restore = |picked: &[&str], wanted: &[&str]| {
        let names = |paths: &[&str]| paths.iter().map(|path| name(path)).collect::<Vec<_>>();
        to_restore(&server(), &names(picked), &names(wanted))
    };
    let part = |of: &str, parts: &[&str]| Part {
        of: name(of),
        parts: parts.iter().map(|&part| part.to_owned()).collect(),
    };
    let both = ["server", "server/orders", "settings"];
    assert_eq!(
        restore(&both, &["settings", "server"]),
        Ok(vec![part("server", &[]), part("settings", &[])]),
        "in the order of the backup"
    );
    assert_eq!(
        restore(&both, &["server/orders/today"]),
        Ok(vec![part("server/orders", &["server/orders/today"])]),
        "of the nearest"
    );
    assert_eq!(
        restore(&["server"], &["server/orders/today"]),
        Ok(vec![part("server", &["server/orders/today"])])
    );
    assert_eq!(
        restore(&both, &["server/orders/today", "server/orders"]),
        Ok(vec![part("server/orders", &[])]),
        "all of it has the part in it"
    );
    for alone in ["server/orders", "server/people"] {
        assert_eq!(
            restore(&["server"], &[alone]),
            Err(comes_with(alone, "server")),
            "selectable for a backup is not for a restore"
        );
    }
    assert_eq!(restore(&["servers"], &["server/orders", "no"]), Ok(vec![]));
}

#[test]
fn what_stands_below_what_is_restored_is_restored_with_it() {
    let component = component("server/orders/today", "");
    assert!(is_with(&component, [("", "server")]));
    assert!(is_with(&component, [("server/orders", "today")]));
    assert!(!is_with(
        &component,
        [("", "servers"), ("server/orders/today", "x")]
    ));
}
