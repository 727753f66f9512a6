//! What a restore is of: writers and components of a set, and what they depend on.
//!
//! Called by `backup`. It reads documents of sets alone; nobody is asked here.

use crate::error::Error;
use crate::protocol::{Need, SetPreRestore};
use crate::snapshot::document::{SetDocument, WriterRecord};
use crate::snapshot::selection::{self, Name, Part, find, is_with, joined};
use guest_agent_wire::components::{RestoreComponent, SelectedComponent};
use guest_agent_wire::host::{WriterComponents, WriterRestore};
use guest_agent_wire::metadata::Component;

/// Each writer of a set with its components, their stamps, and what it stored with them. One that wants no restore events gets none,
/// unless it is named.
///
/// # Errors
/// [`Error::Usage`]: a component was named that is restored with another only.
pub(super) fn what_to_restore(
    document: &SetDocument,
    what: &SetPreRestore,
) -> Result<Vec<WriterRestore>, Error> {
    let is_all = what.writers.is_empty() && what.components.is_empty();
    let mut restored = Vec::new();
    for record in in_scope(document) {
        let all = explicit(document, record);
        let is_named = what.writers.iter().any(|name| record.is_called(name));
        let parts: Vec<Part> = if is_named || (is_all && record.wants_restore_events()) {
            let whole = |of| Part {
                of,
                parts: Vec::new(),
            };
            all.into_iter().map(whole).collect()
        } else {
            let wanted: Vec<Name> = record.picked_of(&what.components).map(name_of).collect();
            let parts = selection::to_restore(described(record), &all, &wanted);
            let parts = parts
                .map_err(|error| Error::Usage(format!("writer {}: {error}", record.instance_id)))?;
            if parts.is_empty() {
                continue;
            }
            parts
        };
        restored.push(WriterRestore {
            writer: record.instance_id.clone(),
            components: parts
                .into_iter()
                .map(|part| restore_component(record, part, what))
                .collect(),
        });
    }
    Ok(restored)
}

fn restore_component(record: &WriterRecord, part: Part, what: &SetPreRestore) -> RestoreComponent {
    let (logical_path, name) = part.of;
    let mut said = record.components().iter();
    let said = said.find(|said| said.logical_path == logical_path && said.name == name);
    RestoreComponent {
        stamp: said.and_then(|said| said.stamp.clone()),
        metadata: said.map(|said| said.metadata.clone()).unwrap_or_default(),
        additional_restores: what.additional_restores,
        options: what.options.clone(),
        logical_path,
        name,
        subcomponents: part.parts,
        ..RestoreComponent::default()
    }
}

/// What components depend on that is not restored with them, by their writers' documents.
pub(super) fn what_it_needs(document: &SetDocument, restored: &[WriterRestore]) -> Vec<Need> {
    let record_of = |writer: &str| {
        let mut records = document.writers.iter();
        records.find(|record| record.instance_id == writer)
    };
    let mut needs = Vec::new();
    for writer in restored {
        let Some(record) = record_of(&writer.writer) else {
            continue;
        };
        for component in described(record) {
            if !is_restored(component, writer) {
                continue;
            }
            for other in &component.dependencies {
                let wanted = (other.logical_path.clone(), other.name.clone());
                let is_there = restored.iter().any(|writer| {
                    let record = record_of(&writer.writer);
                    let record = record.filter(|record| record.is_called(&other.class_id));
                    let component = record.and_then(|record| find(described(record), &wanted));
                    component.is_some_and(|component| is_restored(component, writer))
                });
                if is_there {
                    continue;
                }
                let mut records = in_scope(document);
                let holder = records.find(|record| {
                    record.is_called(&other.class_id) && is_in(document, record, &wanted)
                });
                let holder_name = holder.map_or(&other.class_id, |record| &record.instance_id);
                needs.push(Need {
                    component: shown(&writer.writer, &component.logical_path, &component.name),
                    needs: shown(holder_name, &other.logical_path, &other.name),
                    is_in_set: holder.is_some(),
                });
            }
        }
    }
    needs
}

/// Whether a component of the writer is restored, by itself, as a part, or with all that stands above it.
fn is_restored(component: &Component, writer: &WriterRestore) -> bool {
    writer.components.iter().any(|one| {
        if one.subcomponents.is_empty() {
            is_with(component, [(&*one.logical_path, &*one.name)])
        } else {
            is_with(
                component,
                one.subcomponents.iter().map(|part| ("", &**part)),
            )
        }
    })
}

/// A component in the form in which it is picked.
fn shown(writer: &str, logical_path: &str, name: &str) -> String {
    format!("{writer}={}", joined(logical_path, name))
}

fn name_of(picked: &SelectedComponent) -> Name {
    (picked.logical_path.clone(), picked.name.clone())
}

/// The writers that took part.
pub(super) fn in_scope(document: &SetDocument) -> impl Iterator<Item = &WriterRecord> {
    document.writers.iter().filter(|record| record.in_scope)
}

fn described(record: &WriterRecord) -> &[Component] {
    let metadata = record.metadata();
    metadata.map_or(&[][..], |metadata| &metadata.components)
}

/// A component that the set does not have cannot be restored from it.
pub(super) fn check_restorable(
    document: &SetDocument,
    wanted: &[WriterComponents],
) -> Result<(), Error> {
    for wanted in wanted {
        for one in &wanted.components {
            let name = name_of(one);
            let mut called = in_scope(document).filter(|record| record.is_called(&wanted.writer));
            if called.any(|record| is_in(document, record, &name)) {
                continue;
            }
            let there: Vec<String> = in_scope(document)
                .flat_map(|record| {
                    let names = explicit(document, record).into_iter();
                    names.map(|(path, name)| shown(&record.instance_id, &path, &name))
                })
                .collect();
            let there = match there.as_slice() {
                [] => "none".to_owned(),
                all => all.join(", "),
            };
            return Err(Error::NotFound(format!(
                "set {} has no component {}; it has: {there}",
                document.set,
                shown(&wanted.writer, &name.0, &name.1)
            )));
        }
    }
    Ok(())
}

/// Whether a component of the writer is in the set, picked or with one that was.
fn is_in(document: &SetDocument, record: &WriterRecord, name: &Name) -> bool {
    let explicit = explicit(document, record);
    let above = explicit.iter().map(|(path, name)| (&**path, &**name));
    explicit.contains(name)
        || find(described(record), name).is_some_and(|component| is_with(component, above))
}

/// Logical paths and names of a writer's components in a set: those picked with what had to come, or those that stand for all.
pub(super) fn explicit(document: &SetDocument, record: &WriterRecord) -> Vec<Name> {
    let picked = &document.request.components;
    let mut names: Vec<Name> = record.picked_of(picked).map(name_of).collect();
    if names.is_empty() {
        return selection::all(described(record))
            .map(|component| (component.logical_path.clone(), component.name.clone()))
            .collect();
    }
    // Sets that were made before this rule have picked what they have picked.
    let must_come = record.must_come(picked).unwrap_or_default();
    names.extend(must_come.iter().map(name_of));
    names
}
