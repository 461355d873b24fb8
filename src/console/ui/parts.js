// What pages are made of: buttons, fields, tables, dialogs, messages. Owns how they look and speak. Must never know the
// API.

import { h, show } from './dom.js';
import { stateKind, time } from './words.js';

// Announces something to people who cannot see the page.
export function announce(text) {
  document.getElementById('announcer').textContent = text;
}

// What is the same on every page: its heading and its introduction.
export function page(title, intro, ...children) {
  return [
    h('h1', { tabindex: -1 }, title),
    intro && h('p', { class: 'intro' }, intro),
    children,
  ];
}

export function button(label, onclick, { kind = 'plain', disabled = false, ...more } = {}) {
  return h('button', { type: 'button', class: `button ${kind}`, disabled, onclick, ...more }, label);
}

// A labelled input. `more` are its attributes. `hint` is shown below it, and read aloud with it.
export function field(label, name, { hint, element = 'input', options, text, ...more } = {}) {
  const choices = options?.map(([value, words, selected]) => h('option', { value, selected }, words));
  return h(
    'label',
    { class: 'field' },
    h('span', {}, label),
    h(options ? 'select' : element, { name, ...more }, choices, text),
    hint && h('span', { class: 'hint' }, hint),
  );
}

export function check(label, name, checked) {
  return h('label', { class: 'check' }, h('input', { type: 'checkbox', name, checked }), h('span', {}, label));
}

// A form. `send` gets the values by name, and what it throws is shown and spoken, until the form is sent again or left.
// It is busy meanwhile, and sends nothing twice.
export function form(label, send, fields, { kind = 'primary', cancel } = {}) {
  const onsubmit = async (event) => {
    event.preventDefault();
    // Looked up here: this form may have been drawn over an older one.
    const element = event.currentTarget;
    const problem = element.querySelector('.problem');
    if (element.ariaBusy) return;
    element.ariaBusy = 'true';
    problem.textContent = '';
    try {
      await send(Object.fromEntries(new FormData(element)), element);
    } catch (error) {
      problem.textContent = error.message;
    }
    element.ariaBusy = null;
  };
  const submit = h('button', { type: 'submit', class: `button ${kind}` }, label);
  const buttons = h('div', { class: 'buttons' }, submit, cancel && button('Cancel', cancel, { 'data-local': true }));
  const problem = h('p', { class: 'problem', role: 'alert', 'data-own': label });
  return h('form', { class: 'form', onsubmit, novalidate: true }, fields, problem, buttons);
}

// A table that becomes a list of cards where there is no room. Columns are [heading, class]; rows are { key, cells,
// kind }.
export function table(label, columns, rows, empty) {
  if (rows.length === 0) return h('p', { class: 'empty' }, empty);
  const head = columns.map(([heading, kind]) => h('th', { scope: 'col', role: 'columnheader', class: kind }, heading));
  const body = rows.map(({ key, cells, kind }) =>
    h(
      'tr',
      { role: 'row', 'data-key': key, class: kind },
      cells.map((cell, at) =>
        h('td', { role: 'cell', class: columns[at][1], 'data-label': columns[at][0] }, h('div', {}, cell)),
      ),
    ),
  );
  // The roles are explicit: a table that is laid out as blocks loses them in some browsers.
  return h(
    'table',
    { role: 'table', 'aria-label': label },
    h('thead', { role: 'rowgroup' }, h('tr', { role: 'row' }, head)),
    h('tbody', { role: 'rowgroup' }, body),
  );
}

// A state, shown by its word, a colour and a shape.
export function badge(state) {
  return h('span', { class: `badge ${stateKind(state)} ${state.toLowerCase()}` }, state);
}

export function when(value) {
  if (!value) return h('span', { class: 'quiet' }, 'never');
  return h('time', {}, time(value));
}

// Links to the status pages of the members, which answer even without a PRIMARY; null if there are none.
export function statusPages(status, port) {
  if (!status || !port) return null;
  const link = ({ name, address }) => h('a', { statusPage: { address, port } }, name);
  return status.membership.members.map((member, at) => [at > 0 && ' · ', link(member)]);
}

export function card(title, attributes, ...children) {
  const id = `card-${title.toLowerCase().replace(/[^a-z]+/g, '-')}`;
  return h(
    'section',
    { class: 'card', 'aria-labelledby': id, 'data-key': id, ...attributes },
    h('h2', { id }, title),
    children,
  );
}

// Copies a text, and says so on the button, or why it could not be copied.
export function copyButton(text, label = 'Copy') {
  const copy = async (event) => {
    const element = event.currentTarget;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      toast('The browser does not let this page copy. Select the text and copy it by hand.', 'bad');
      return;
    }
    element.textContent = 'Copied';
    announce('Copied to the clipboard');
    setTimeout(() => {
      element.textContent = label;
    }, 2000);
  };
  return button(label, copy, { class: 'button copy' });
}

// A modal dialog around what `body(close)` returns. Resolves with what `close` is given, or undefined if the user
// leaves it.
export function dialog(title, body) {
  const { promise, resolve } = Promise.withResolvers();
  const element = h('dialog', { 'aria-labelledby': 'dialog-title' });
  const close = (value) => {
    resolve(value);
    element.close();
  };
  element.addEventListener('close', () => {
    resolve(undefined);
    element.remove();
  });
  show(element, h('h2', { id: 'dialog-title' }, title), body(close));
  document.body.append(element);
  element.showModal();
  // Never on the button that acts: a key that is still held down would press it.
  (element.querySelector('input, select, textarea') ?? element.querySelector('.buttons .button:last-child'))?.focus();
  return promise;
}

// A dialog with a question. `work` runs while it is open, and what it throws is shown there. With `typed`, that text
// must be entered first. Resolves with true once `work` is done.
export function confirm(title, content, label, work, { kind = 'primary', typed } = {}) {
  return dialog(title, (close) => {
    const send = async (values) => {
      if (typed !== undefined && values.typed !== typed) throw new Error(`Type ${typed} to confirm.`);
      await work(values);
      close(true);
    };
    const fields = [
      content,
      typed !== undefined && field(`Type ${typed} to confirm`, 'typed', { autocomplete: 'off', spellcheck: 'false' }),
    ];
    return form(label, send, fields, { kind, cancel: () => close(false) });
  });
}

// A passing message at the edge of the page.
export function toast(text, kind = 'good') {
  const element = h('div', { class: `toast ${kind}` }, text);
  // At most two at a time: more would cover the page.
  const place = document.getElementById('toasts');
  if (place.childElementCount > 1) place.firstElementChild.remove();
  place.append(element);
  announce(text);
  setTimeout(() => element.remove(), 6000);
}
