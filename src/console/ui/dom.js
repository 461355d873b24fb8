// Makes elements out of data, and changes those that are shown into the next ones. Owns every element that is made.
// Must never interpret text: whatever comes from the cluster becomes a text node or the value of a harmless attribute.

const SVG = 'http://www.w3.org/2000/svg';
const LISTENERS = Symbol('listeners');

function dispatch(event) {
  event.currentTarget[LISTENERS]?.[event.type]?.(event);
}

function listen(node, type, listener) {
  if (!node[LISTENERS]) node[LISTENERS] = {};
  if (!(type in node[LISTENERS])) node.addEventListener(type, dispatch);
  node[LISTENERS][type] = listener;
}

// The only link to another host: to the status page of a member, and only if its address and port are valid.
function statusPage(node, { address, port }) {
  const host = address.includes(':') ? `[${address}]` : address;
  if (!/^[\w.:[\]-]+$/.test(host) || !Number.isInteger(port)) return;
  node.setAttribute('href', `http://${host}:${port}/status`);
  node.setAttribute('target', '_blank');
  node.setAttribute('rel', 'noopener noreferrer');
}

function set(node, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (name.startsWith('on')) {
    if (typeof value !== 'function') throw new TypeError(`${name} must be a function`);
    listen(node, name.slice(2), value);
  } else if (name === 'swatch') {
    // The only style that comes from data, and only if it is a colour.
    if (/^#[0-9a-f]{6}$/i.test(value)) node.style.backgroundColor = value;
  } else if (name === 'statusPage') {
    statusPage(node, value);
  } else if (name === 'href' && !/^(#|\/(?![/\\]))/.test(value)) {
    throw new TypeError('links lead to this page, to this host, or to the status page of a member');
  } else if (name === 'style' || name === 'src') {
    throw new TypeError(`${name} is not for data`);
  } else {
    node.setAttribute(name, value === true ? '' : String(value));
  }
}

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) set(node, name, value);
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false || child === '') continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

// Makes an HTML element. Children are elements, text, or lists of both; null, undefined, false and '' are left out.
export function h(tag, attributes, ...children) {
  return build(document.createElement(tag), attributes, children);
}

// Makes an SVG element.
export function s(tag, attributes, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

function alike(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && a.dataset?.key === b.dataset?.key;
}

// Attributes that the user changes, or what he has done, and that drawing again must not undo.
const KEPT = new Set(['open', 'value', 'checked', 'aria-busy']);

const keeps = (element, name) => KEPT.has(name) && element.nodeName !== 'PROGRESS';

function morphAttributes(old, next) {
  for (const { name } of [...old.attributes]) {
    if (!next.hasAttribute(name) && !keeps(old, name)) old.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    // Set only when it differs: some screen readers speak again when an attribute is set again. A style is set as a
    // property, since the policy of the page forbids the attribute.
    if (name !== 'style' && !keeps(old, name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (next.style && old.style.backgroundColor !== next.style.backgroundColor) {
    old.style.backgroundColor = next.style.backgroundColor;
  }
  for (const type of Object.keys({ ...old[LISTENERS], ...next[LISTENERS] })) {
    listen(old, type, next[LISTENERS]?.[type]);
  }
}

function morphChildren(old, next) {
  const keyed = new Map();
  for (const child of old.children) if (child.dataset.key !== undefined) keyed.set(child.dataset.key, child);
  let at = old.firstChild;
  for (const child of [...next.childNodes]) {
    const key = child.dataset?.key;
    const found = key === undefined ? at : keyed.get(key);
    if (!found || !alike(found, child)) {
      old.insertBefore(child, at);
      continue;
    }
    if (found === at) at = at.nextSibling;
    else old.insertBefore(found, at);
    morph(found, child);
  }
  while (at) {
    const rest = at.nextSibling;
    at.remove();
    at = rest;
  }
}

// Says something to whoever used it: what is in it stays when the same is drawn again, and goes with another one.
const isOwn = (old, next) => old.dataset?.own !== undefined && old.dataset.own === next.dataset.own;

// Makes `old`, which is shown, look like `next`. Keeps an element, with its focus, its selection and what was typed, if
// both have it in the same place or with the same data-key; with the same data-own, also what is in it.
function morph(old, next) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return;
  }
  const own = isOwn(old, next);
  morphAttributes(old, next);
  if (!own) morphChildren(old, next);
}

// Replaces the children of an element with these.
export function show(parent, ...children) {
  morphChildren(parent, build(document.createDocumentFragment(), {}, children));
}
